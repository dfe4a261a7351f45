"""Arguments that several commands share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from remoe.errors import ConfigError, DataError


def recipes_like(incomplete: str) -> list[str]:
    """What a shell offers for a recipe, or for the last of several; where there is none, it offers files."""
    from remoe.recipes import names

    before, comma, begun = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in names() if name.startswith(begun)]


CONFIG = typer.Argument(
    metavar="CONFIG", help="a YAML file, or a recipe (`remoe recipes` lists them)", autocompletion=recipes_like
)
Config = Annotated[str, CONFIG]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. train.steps=100; more may follow"),
]
Root = Annotated[Path, typer.Option("--root", metavar="DIR", help="folder of the runs")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def file_to_write(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """The path itself; ConfigError where a folder is there, before anything takes time."""
    if path is not None and path.is_dir():
        raise ConfigError(f"{parameter.opts[0]} is {path}, a folder, must be a file")
    return path


@contextmanager
def data_named() -> Iterator[None]:
    """Inside, errors about `data.validation` name --data, which stands for it."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).replace("data.validation", "--data")) from None


THRESHOLD = "density dial: what every layer's router logits must be above, in place of the saved thresholds"

RUNS = Path("runs")


def present(name: str) -> str:
    """The device itself; ConfigError where torch has none of that name."""
    if name != "auto":  # as it is while a shell completes a command, which must not wait for torch
        from remoe.training.setup import pick_device

        pick_device(name, "--device")
    return name


Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N", callback=present)]


def existing(path: Path) -> Path:
    """The path itself; ConfigError names the folder of a run that was given without `runs/`."""
    if not path.exists() and (RUNS / path).exists():
        raise ConfigError(f"{path} does not exist; did you mean {RUNS / path}?")
    return path


RunPath = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="a run's folder, one of its checkpoints, or an export", callback=existing),
]


def words(text: str) -> list[str]:
    """The parts of a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]
