"""`remoe analyze`: one report about a run, or about several side by side."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from remoe.cli.options import existing

RUNS_HELP = "runs or comparisons, the main one first; or models that are no runs, with a curve of `remoe density`"


def analyze_command(
    runs: Annotated[list[Path], Argument(metavar="RUN", help=RUNS_HELP)],
    to: Annotated[Path | None, Option("--to", metavar="FILE", help="the report; by default the first run's")] = None,
) -> None:
    """Look at what routers do.

    Writes one self-contained report.html.
    """
    from remoe.analysis import write_report

    found = [run for path in runs for run in _runs_at(existing(path))]
    print(f"report: {write_report(found, to or runs[0] / 'report.html')}")


def _runs_at(path: Path) -> list[Path]:
    """The runs of a comparison in its order, else the path itself."""
    import json

    record = path / "comparison.json"
    if not record.is_file():
        return [path]
    return [path / name.rpartition("/")[2] for name in json.loads(record.read_text(encoding="utf-8"))["runs"]]
