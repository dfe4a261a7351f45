"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file, or a recipe (`remoe recipes` lists them)")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. train.steps=100; repeatable"),
]
Root = Annotated[Path, typer.Option("--root", metavar="DIR", help="folder of the runs")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder, one of its checkpoints, or an export")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]

RUNS = Path("runs")


def words(text: str) -> list[str]:
    """The parts of a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]
