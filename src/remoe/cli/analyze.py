"""`remoe analyze`: one report about a run, or about several side by side."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def analyze_command(
    runs: Annotated[list[Path], Argument(metavar="RUN...", help="run folders; the first is the main one")],
    to: Annotated[Path | None, Option("--to", metavar="FILE", help="the report; by default the first run's")] = None,
) -> None:
    """Look at what routers do.

    Writes one self-contained report.html.
    """
    from remoe.analysis import write_report

    print(f"report: {write_report(runs, to or runs[0] / 'report.html')}")
