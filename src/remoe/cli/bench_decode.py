"""`remoe bench decode`: prefill and decoding."""

import sys
from typing import Annotated

from typer import Option

from remoe.cli.bench_options import Chart, Configs, Json, Peers, finish, read_configs
from remoe.cli.options import Device, Overrides, words


def decode_command(
    configs: Configs,
    overrides: Overrides = None,
    batches: Annotated[str, Option(help="texts at a time, joined by commas")] = "1,64",
    prompt: Annotated[str, Option(metavar="BxS", help="sequences and tokens of the prefill")] = "16x1024",
    context: Annotated[int, Option(help="tokens before the first that is decoded", min=1)] = 128,
    new_tokens: Annotated[int, Option(help="tokens that are timed", min=1)] = 64,
    repeats: Annotated[int, Option(help="times of each, in turn", min=1)] = 5,
    peers: Peers = "none",
    device: Device = "auto",
    json: Json = None,
    chart: Chart = None,
) -> None:
    """Prefill and decoding: ReLU and Top-K in turn, and transformers. Exits with 1 where the cache changes a token."""
    from remoe.bench.chart import check_chart_path
    from remoe.bench.decode import PEERS, DecodeBench, bench_decode
    from remoe.bench.settings import chosen, sizes_of, whole_numbers
    from remoe.bench.tables import decode_table, model_line
    from remoe.training.setup import pick_device

    check_chart_path(chart)
    config = DecodeBench(
        configs=read_configs(configs, overrides),
        peers=chosen("--peers", words(peers), PEERS),
        device=pick_device(device),
        prompt=sizes_of(prompt),
        batches=whole_numbers("--batches", words(batches)),
        context=context,
        new_tokens=new_tokens,
        repeats=repeats,
        path=json,
        show=lambda row: print(model_line(row), file=sys.stderr),
    )
    results = bench_decode(config)
    finish(results, [decode_table(results)], chart)
