"""`remoe export`: a run's model as safetensors, with its config, tokenizer and a short model card."""

from pathlib import Path
from typing import Annotated

from typer import Option

from remoe.cli.options import RunPath


def export_command(
    path: RunPath,
    to: Annotated[Path, Option("--to", metavar="DIR", help="folder to write; must be new or empty")],
    overwrite: Annotated[bool, Option("--overwrite", help="write into a folder that holds files")] = False,
) -> None:
    """Save a run's model as files.

    Writes model.safetensors (sharded when large), config.json, the tokenizer's files and a short model card.
    """
    from remoe.cli.card import model_card
    from remoe.errors import ConfigError
    from remoe.model.weights import save_model
    from remoe.training import load
    from remoe.training.saved import run_of, tokenizer_of

    if to.exists() and not to.is_dir():
        raise ConfigError(f"--to is {to}, a file, must be a folder")
    if to.is_dir() and any(to.iterdir()) and not overwrite:
        raise ConfigError(f"--to is {to}, which holds files, must be new or empty; --overwrite writes into it")
    model, tokenizer, run = load(path), tokenizer_of(path), run_of(path)
    save_model(model, to)
    tokenizer.save(to)
    if run is not None:
        (to / "README.md").write_text(model_card(run, to), encoding="utf-8")
    print(f"{to}: {', '.join(sorted(file.name for file in to.iterdir()))}")
