"""`remoe bench tune`: the table of back-ends and tiles that the kernels read."""

import sys
from pathlib import Path
from typing import Annotated

from typer import Option

from remoe.cli.bench_options import Deadline, Json
from remoe.cli.options import Device, words


def tune_command(
    shapes: Annotated[str, Option(help="names joined by commas; default: those that suit the device")] = "",
    device: Device = "auto",
    dtype: Annotated[str, Option(help="bf16, fp16 or fp32; default: bf16 on a GPU, fp32 on a CPU")] = "",
    parts: Annotated[str, Option(help="parts to settle, joined by commas, e.g. grad_up; default: all")] = "",
    table: Annotated[Path | None, Option(metavar="FILE", help="the table; default: its place in the package")] = None,
    json: Json = None,
    deadline: Deadline = None,
) -> None:
    """Time the kernels' choices at each shape and write the table that they read."""
    from remoe.bench.settings import dtype_named
    from remoe.bench.shapes import shapes_named
    from remoe.bench.tables import tune_line
    from remoe.bench.tune import Tuning, tunable, tune
    from remoe.training.setup import pick_device

    where = pick_device(device)
    tuning = Tuning(
        shapes=shapes_named(words(shapes), where.type),
        device=where,
        dtype=dtype_named(dtype, where),
        parts=words(parts),
        deadline_seconds=deadline,
        path=json,
        table=table,
        show=lambda row: print(tune_line(row), file=sys.stderr),
    )
    results = tune(tuning, tunable())
    print("\n".join(tune_line(row) for row in results.rows))
