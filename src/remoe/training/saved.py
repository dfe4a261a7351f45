"""What lies beside saved weights: the run they belong to, its tokenizer and its chat template."""

from pathlib import Path

from remoe.data.chat import ChatTemplate, saved_template
from remoe.data.named_tokenizer import load_saved_tokenizer
from remoe.data.tokenizer import CARD, Tokenizer
from remoe.errors import CheckpointError
from remoe.training.run import CONFIG, TOKENIZER, Run


def run_of(path: Path) -> Run | None:
    """The run that a run folder or one of its checkpoints belongs to; None for an export."""
    folders = (path, *path.absolute().parents[:2])
    return next((Run.open(folder) for folder in folders if (folder / CONFIG).is_file()), None)


def tokenizer_folder(path: Path) -> Path:
    """Where the tokenizer and the template of saved weights are, if they have some."""
    run = run_of(path)
    return run.path / TOKENIZER if run else path


def tokenizer_beside(path: Path) -> str | None:
    """What `data.tokenizer` is for saved weights, ours or those of transformers; None where none is with them."""
    folder = tokenizer_folder(path)
    return str(folder) if any((folder / name).is_file() for name in (CARD, "tokenizer.json")) else None


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer that a run, checkpoint or export was saved with."""
    folder = tokenizer_folder(path)
    if not (folder / CARD).is_file():
        raise CheckpointError(
            f"{path} is not a run, one of its checkpoints or an export with its tokenizer; `remoe runs` lists the runs"
        )
    return load_saved_tokenizer(folder)


def template_of(path: Path) -> ChatTemplate | None:
    """The chat template that a run was fine-tuned with; None where it was not."""
    return saved_template(tokenizer_folder(path))


def chat_template_of(path: Path) -> ChatTemplate:
    """The chat template that a run was fine-tuned with; CheckpointError where it was not."""
    template = template_of(path)
    if template is None:
        raise CheckpointError(
            f"{path} has no chat template, must be fine-tuned on conversations (data.format: instructions); "
            "go on from plain text instead"
        )
    return template
