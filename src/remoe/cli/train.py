"""`remoe train`: one run, from a config to a report."""

from typing import Annotated

import typer

from remoe.cli.options import CONFIG, RUNS, Overrides, Root

Flag = typer.Option


def train_command(
    config: Annotated[str | None, CONFIG] = None,
    overrides: Overrides = None,
    resume: Annotated[bool, Flag("--resume", help="go on with the run of this name after its last checkpoint")] = False,
    overwrite: Annotated[bool, Flag("--overwrite", help="begin the run of this name anew")] = False,
    report: Annotated[bool, Flag("--report/--no-report", help="write report.html at the end")] = True,
    keys: Annotated[bool, Flag("--keys", help="list every key with its default and meaning, and exit")] = False,
    root: Root = RUNS,
) -> None:
    """Train one model.

    The run is kept in runs/NAME: config.yaml, metrics.jsonl, checkpoints/, report.html. On several GPUs or CPUs:
    torchrun --standalone --nproc-per-node 2 -m remoe train CONFIG
    """
    from remoe.cli.report import report_on
    from remoe.errors import ConfigError
    from remoe.recipes import read_config

    if keys:
        print(_keys())
        return
    if config is None:
        raise ConfigError("CONFIG is missing, must be a YAML file or a recipe; try: remoe train demo-relu")
    settings = read_config(config, overrides or ())  # a mistake in it comes before the seconds that torch takes to load

    from remoe.distributed.world import is_first
    from remoe.training import train
    from remoe.training.progress import terminal_reporter

    run = train(settings, resume=resume, overwrite=overwrite, root=root, reporter=terminal_reporter())
    if not is_first():  # torchrun started several; one speaks for all
        return
    print(f"{run.path}: validation loss {run.valid_loss:.4f} after {run.tokens:,} tokens")
    if report:
        print(report_on([run.path], run.path / "report.html"))


def _keys() -> str:
    from remoe.config import describe_keys
    from remoe.training.config import TrainConfig

    lines = []
    for key, default, help in describe_keys(TrainConfig):
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        lines.append(f"{key} = {shown}\n    {help}")
    return "\n".join(lines)
