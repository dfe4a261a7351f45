"""`remoe bench model`: whole models in training."""

import sys
from typing import Annotated

from typer import Option

from remoe.cli.bench_options import Chart, Configs, Deadline, Json, Peers, finish, read_configs
from remoe.cli.options import Device, Overrides, words
from remoe.errors import ConfigError


def model_command(
    configs: Configs,
    overrides: Overrides = None,
    steps: Annotated[int, Option(help="optimizer steps that are timed", min=1)] = 8,
    micro_batch: Annotated[int | None, Option(help="sequences a forward pass; default: the config's", min=1)] = None,
    accumulation: Annotated[int, Option(help="forward passes an optimizer step", min=1)] = 16,
    phases: Annotated[str, Option(help="start, steady or all")] = "start,steady",
    peers: Peers = "none",
    compiled: Annotated[bool, Option("--compile/--no-compile", help="torch.compile ours and the peers")] = True,
    profile: Annotated[bool, Option("--profile", help="show the kernels of a step of ours")] = False,
    device: Device = "auto",
    json: Json = None,
    chart: Chart = None,
    deadline: Deadline = None,
) -> None:
    """Whole models in training: ReLU and Top-K in turn, at the dense start and in steady state, and transformers."""
    from remoe.bench.chart import check_chart_path
    from remoe.bench.model import PEERS, PHASES, ModelBench, bench_model, with_sizes
    from remoe.bench.settings import chosen
    from remoe.bench.tables import model_line, model_table, profile_table, ratio_lines
    from remoe.training.setup import pick_device

    check_chart_path(chart)
    measured = chosen("--phases", words(phases), PHASES, or_none=False)
    if profile and "steady" not in measured:
        raise ConfigError(f"--profile shows steps of the steady state, and --phases is {phases!r}; add steady to it")
    runs = {
        name: with_sizes(run, micro_batch or run.train.micro_batch, accumulation, compiled)
        for name, run in read_configs(configs, overrides).items()
    }
    config = ModelBench(
        configs=runs,
        peers=chosen("--peers", words(peers), PEERS),
        device=pick_device(device),
        steps=steps,
        phases=measured,
        profile=profile,
        deadline_seconds=deadline,
        path=json,
        show=lambda row: print(model_line(row), file=sys.stderr),
    )
    results = bench_model(config)
    profiles = [profile_table(row) for row in results.rows if "profile" in row]
    finish(results, [model_table(results), *ratio_lines(results), *profiles], chart)
