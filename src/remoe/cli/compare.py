"""`remoe compare`: several routers over several seeds, paired."""

from typing import Annotated

import typer

from remoe.cli.options import RUNS, Config, Overrides, Root, words
from remoe.cli.rows import as_table


def compare_command(
    config: Config,
    routers: Annotated[str, typer.Option(help="routers, `dense` or recipes; the others are compared with the first")],
    name: Annotated[str, typer.Option(help="the comparison's folder below runs/")],
    seeds: Annotated[str, typer.Option(help="seeds of initial values and data order")] = "0",
    equal: Annotated[
        str, typer.Option(help="steps, or flops: train on to the first router's measured FLOPs")
    ] = "steps",
    overrides: Overrides = None,
    parallel: Annotated[int, typer.Option(help="runs at a time, each a process of its own", min=1)] = 1,
    devices: Annotated[str, typer.Option(help="spread runs over these devices, e.g. cuda:0,cuda:1")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="train finished runs anew")] = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="write report.html at the end")] = True,
    root: Root = RUNS,
) -> None:
    """Compare routers over seeds, paired.

    Per seed all routers see the same batches and start with the same shared values. Finished runs are kept,
    interrupted ones go on. Writes comparison.json and report.html.
    """
    from remoe.cli.report import report_on
    from remoe.recipes.comparison import compare
    from remoe.recipes.plan import Plan

    plan = Plan(
        name=name, config=config, routers=words(routers), seeds=_numbers(seeds), overrides=overrides or (), equal=equal
    )
    slots = words(devices) * parallel if devices else ["auto"] * parallel if parallel > 1 else []
    result = compare(plan, root=root, devices=slots, overwrite=overwrite)
    print(as_table(result.rows, len(plan.seeds)))
    if report:
        print(report_on(result.runs, result.path / "report.html"))


def _numbers(text: str) -> list[int]:
    from remoe.errors import ConfigError

    if not all(part.isdecimal() for part in words(text)):
        raise ConfigError(f"--seeds is {text!r}, must be whole numbers joined by commas, e.g. 0,1,2")
    return [int(part) for part in words(text)]
