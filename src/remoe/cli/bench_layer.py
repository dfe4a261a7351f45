"""`remoe bench layer`: one MoE layer beside its peers."""

import sys
from typing import Annotated

from typer import Option

from remoe.cli.bench_options import Chart, Deadline, Json, Peers, finish
from remoe.cli.options import Device, words


def layer_command(
    shapes: Annotated[str, Option(help="names joined by commas; default: those that suit the device")] = "",
    peers: Peers = "dense,grouped_mm",
    ours: Annotated[str, Option(help="our columns joined by commas; default: all that differ here")] = "",
    device: Device = "auto",
    dtype: Annotated[str, Option(help="bf16, fp16 or fp32; default: bf16 on a GPU, fp32 on a CPU")] = "",
    json: Json = None,
    chart: Chart = None,
    profile: Annotated[bool, Option("--profile", help="show each candidate's kernels")] = False,
    deadline: Deadline = None,
) -> None:
    """One MoE layer, forward and backward: ours, peers, a dense MLP of the same FLOPs, the machine's limit.

    Exits with 1 where a result differs from plain PyTorch in a wider type.
    """
    from remoe.bench import ours as columns
    from remoe.bench.chart import check_chart_path
    from remoe.bench.layer import LayerBench, bench_layer
    from remoe.bench.peers import PEERS
    from remoe.bench.settings import chosen, dtype_named
    from remoe.bench.shapes import shapes_named
    from remoe.bench.tables import layer_line, layer_table, profile_table
    from remoe.training.setup import pick_device

    where = pick_device(device)
    check_chart_path(chart)
    config = LayerBench(
        shapes=shapes_named(words(shapes), where.type),
        peers=chosen("--peers", words(peers), PEERS),
        ours=chosen("--ours", words(ours), columns.COLUMNS, or_none=False) if ours else columns.default_columns(where),
        device=where,
        dtype=dtype_named(dtype, where),
        deadline_seconds=deadline,
        profile=profile,
        path=json,
        show=lambda row: print(layer_line(row), file=sys.stderr),
    )
    results = bench_layer(config)
    profiles = [profile_table(row) for row in results.rows if "profile" in row]
    finish(results, [layer_table(results), *profiles], chart)
