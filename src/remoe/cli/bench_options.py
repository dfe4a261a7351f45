"""Arguments that the benchmarks share, and how each of them ends."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from remoe.cli.options import file_to_write, recipes_like, words

if TYPE_CHECKING:
    from remoe.bench.results import Results
    from remoe.training.config import TrainConfig

Json = Annotated[
    Path | None, Option("--json", metavar="FILE", help="write the measurements here", callback=file_to_write)
]
Chart = Annotated[
    Path | None, Option("--chart", metavar="FILE", help="draw them: .svg or .png", callback=file_to_write)
]
Deadline = Annotated[float | None, Option(metavar="SECONDS", help="leave out what begins later", min=0)]
Configs = Annotated[
    str,
    Argument(metavar="CONFIG[,CONFIG...]", help="YAML files or recipes (`remoe recipes`)", autocompletion=recipes_like),
]
Peers = Annotated[str, Option(help="names joined by commas, all, or none")]


def read_configs(configs: str, overrides: list[str] | None) -> "dict[str, TrainConfig]":
    """The runs by name, with their vocabularies."""
    from remoe.bench.settings import resolved
    from remoe.recipes import read_config

    return {Path(name).stem: resolved(read_config(name, overrides or ())) for name in words(configs)}


def finish(results: "Results", tables: list[Any], chart: Path | None) -> None:
    """Show, draw, and then complain about what differs."""
    from remoe.bench.chart import draw
    from remoe.bench.tables import console

    console().print(*tables, sep="\n\n")
    if chart is not None:
        draw(results.to_dict(), chart)
    results.check()
