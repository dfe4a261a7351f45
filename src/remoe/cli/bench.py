"""`remoe bench`: speed and memory beside the peers that are installed."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from remoe.cli.options import words

bench_app = typer.Typer(
    help="Measure layers and models beside the peers that are installed.",
    epilog="Example: remoe bench layer --peers all --chart layer.svg",
    no_args_is_help=True,
)

Device = Annotated[str, Option(help="auto, cpu, cuda or cuda:N")]
Json = Annotated[Path | None, Option("--json", metavar="FILE", help="write the measurements here")]
Chart = Annotated[Path | None, Option("--chart", metavar="FILE", help="draw them: .svg or .png")]


@bench_app.command("layer", epilog="Example: remoe bench layer --shapes remoe182m_E8 --peers all --json layer.json")
def layer_command(
    shapes: Annotated[str, Option(help="names joined by commas; default: those that suit the device")] = "",
    peers: Annotated[str, Option(help="names joined by commas, all, or none")] = "dense,grouped_mm",
    ours: Annotated[str, Option(help="our columns joined by commas; default: all that differ here")] = "",
    device: Device = "auto",
    dtype: Annotated[str, Option(help="bf16, fp16 or fp32; default: bf16 on a GPU, fp32 on a CPU")] = "",
    json: Json = None,
    chart: Chart = None,
    profile: Annotated[bool, Option("--profile", help="show each candidate's kernels")] = False,
    deadline: Annotated[float | None, Option(metavar="SECONDS", help="leave out what begins later", min=0)] = None,
) -> None:
    """One MoE layer, forward and backward: ours, peers, a dense MLP of the same FLOPs, the machine's limit.

    Exits with 1 where a result differs from plain PyTorch in a wider type.
    """
    import sys

    from remoe.bench.chart import check_chart_path, draw
    from remoe.bench.layer import LayerBench, bench_layer
    from remoe.bench.ours import columns_named
    from remoe.bench.peers import peers_named
    from remoe.bench.settings import dtype_named
    from remoe.bench.shapes import shapes_named
    from remoe.bench.tables import console, layer_line, layer_table, profile_table
    from remoe.training.setup import pick_device

    where = pick_device(device)
    check_chart_path(chart)
    config = LayerBench(
        shapes=shapes_named(words(shapes), where.type),
        peers=peers_named(words(peers)),
        ours=columns_named(words(ours), where),
        device=where,
        dtype=dtype_named(dtype, where),
        deadline_seconds=deadline,
        profile=profile,
        path=json,
        show=lambda row: print(layer_line(row), file=sys.stderr),
    )
    results = bench_layer(config)
    console().print(layer_table(results), *(profile_table(row) for row in results.rows if "profile" in row), sep="\n\n")
    if chart is not None:
        draw(results.to_dict(), chart)
    results.check()
