"""`remoe runs`: the runs there are, and how two of them differ."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from remoe.cli.diff import diff_command
from remoe.cli.options import RUNS, Root
from remoe.cli.table import number, table
from remoe.errors import ConfigError

if TYPE_CHECKING:
    from remoe.training import Run

runs_app = typer.Typer(help="List runs, or show how two differ.")
runs_app.command("diff", epilog="Example: remoe runs diff runs/a runs/b")(diff_command)


@runs_app.callback(invoke_without_command=True, epilog="Example: remoe runs diff runs/a runs/b")
def runs_command(context: typer.Context, root: Root = RUNS) -> None:
    """List runs, or show how two differ (`diff`)."""
    if context.invoked_subcommand is None:
        if root.is_file():
            raise ConfigError(f"--root is {root}, a file, must be a folder of runs")
        paths = sorted(metrics.parent for metrics in root.rglob("metrics.jsonl"))
        lines = [_line(path, root) for path in paths if (path / "config.yaml").exists()]
        header = ("run", "state", "steps", "valid loss", "sparsity", "active experts", "last change")
        print(table(header, lines) if lines else f"no runs in {root}; `remoe demo` makes three")


def _line(path: Path, root: Path) -> tuple[str, ...]:
    from remoe.errors import RemoeError

    name = str(path.relative_to(root))
    try:
        return name, *_state(path)
    except (RemoeError, OSError):  # one that another version wrote, say; `remoe runs diff` tells what is wrong
        return (name, "unreadable", *[""] * 5)


def _state(path: Path) -> tuple[str, ...]:
    from datetime import datetime

    from remoe.recipes.results import outcome
    from remoe.training import Run

    run = Run.open(path)
    result = outcome(run)
    changed = datetime.fromtimestamp((path / "metrics.jsonl").stat().st_mtime)
    return (
        _word(run, result["step"]),
        f"{result['step']}/{run.config.train.steps}",
        number(result["valid_loss"], ".4f"),
        number(result["sparsity"], ".3f"),
        number(result["active_experts"], ".3f"),
        f"{changed:%Y-%m-%d %H:%M}",
    )


def _word(run: "Run", step: int) -> str:
    from remoe.recipes.results import is_finished
    from remoe.training import checkpoint, lock

    if lock.is_held(run.path):
        return "running"
    if not checkpoint.paths(run.checkpoints):
        return "no checkpoint"
    return "finished" if is_finished(run, step) else "interrupted"
