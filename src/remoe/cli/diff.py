"""`remoe runs diff`: the settings and results in which two runs differ."""

from remoe.cli.options import RunPath
from remoe.cli.table import number, table


def diff_command(first: RunPath, second: RunPath) -> None:
    """Show the settings and results in which two runs differ."""
    from remoe.config import to_dict
    from remoe.recipes.results import differences, outcome
    from remoe.training import Run

    runs = Run.open(first), Run.open(second)
    settings = differences(to_dict(runs[0].config), to_dict(runs[1].config))
    outcomes = [outcome(run) for run in runs]
    results = [(key, *(_shown(result[key]) for result in outcomes)) for key in outcomes[0]]
    rows = [(key, str(before), str(after)) for key, (before, after) in settings.items()]
    print(table(("key", str(first), str(second)), [*rows, *results]))


def _shown(value: float | None) -> str:
    return f"{value:,}" if isinstance(value, int) else number(value, ".4f")
