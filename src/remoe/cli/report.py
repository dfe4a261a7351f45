"""Reports at the end of other commands: worth having, not worth failing for."""

from collections.abc import Sequence
from pathlib import Path

from remoe.errors import MissingExtraError


def report_on(runs: Sequence[Path], to: Path) -> str:
    """Write a report and say where it is; without matplotlib, say how to get it."""
    from remoe.analysis import write_report

    try:
        return f"report: {write_report(runs, to)}"
    except MissingExtraError as error:
        return f"no report: {error}; then: remoe analyze {' '.join(map(str, runs))}"
