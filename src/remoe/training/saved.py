"""What lies beside saved weights: the run they belong to and its tokenizer."""

from pathlib import Path

from remoe.data.tokenizer import CARD, Tokenizer, load_saved_tokenizer
from remoe.errors import CheckpointError
from remoe.training.run import TOKENIZER, Run


def run_of(path: Path) -> Run | None:
    """The run that a run folder or one of its checkpoints belongs to; None for an export."""
    folders = (path, *path.absolute().parents[:2])
    return next((Run.open(folder) for folder in folders if (folder / "config.yaml").is_file()), None)


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer that a run, checkpoint or export was saved with."""
    run = run_of(path)
    folder = run.path / TOKENIZER if run else path
    if not (folder / CARD).is_file():
        raise CheckpointError(
            f"{path} is not a run, one of its checkpoints or an export with its tokenizer; `remoe runs` lists the runs"
        )
    return load_saved_tokenizer(folder)
