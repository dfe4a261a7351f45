"""Tokens a second and peak memory of one model on several GPUs, layout by layout, beside one GPU in the same call.

ReLU and Top-K each, in the steady state that `remoe.bench.steady` sets or as they start, at a learning rate of 0, on
random tokens: each rank has the same micro-batches in every layout. Started by torchrun; the first process writes the
results. Example:

    torchrun --standalone --nproc-per-node 4 benchmarks/scale_out.py remoe-469m-relu --expert 1 4 \
        --micro-batch 8 --accumulation 4 --output results/scale_out_469m.json
"""

import argparse
import dataclasses
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from remoe.bench import machine, steady
from remoe.bench.fresh import fresh_model, random_batch
from remoe.bench.model import with_sizes
from remoe.data import Batch
from remoe.distributed import launch
from remoe.distributed.config import ParallelConfig, resolve_parallel
from remoe.distributed.ranks import Ranks
from remoe.distributed.world import is_first, world_size
from remoe.model import ReMoEForCausalLM
from remoe.recipes import read_config
from remoe.training.config import TrainConfig
from remoe.training.setup import pick_device
from remoe.training.step import Stepper

START = "start: a fresh model, half of whose gates are open with ReLU routing: its peak memory is the run's"
WARM_UP = 3
SETTLING_TOKENS = 16384
SPARE_ROWS = 1.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a recipe's name or a YAML file")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--expert", nargs="+", type=int, default=[1], help="expert-parallel sizes to measure")
    parser.add_argument("--routers", nargs="+", default=["relu", "topk"])
    parser.add_argument("--phases", nargs="+", default=["steady"], choices=["steady", "start"], help=START)
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences of one rank's forward pass")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of one rank's step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--no-baseline", action="store_true", help="for models that one GPU cannot hold")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = launch.local_device(pick_device("auto"))
    with launch.process_group(device, 600):
        rows = measure_all(options, device)
    if is_first() and options.output is not None:
        options.output.write_text(json.dumps({"machine": machine.describe(), "rows": rows}, indent=1) + "\n")


def measure_all(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Every router in every layout; the baseline on the first GPU, while the others wait."""
    rows = []
    for router in options.routers:
        config = read_config(options.config, [*options.overrides, f"model.router={router}"])
        for expert in options.expert:
            parallel = resolve_parallel(dataclasses.replace(config.parallel, expert=expert), world_size())
            ranks = launch.join(parallel, device)
            needs_baseline = expert == options.expert[0] and world_size() > 1 and not options.no_baseline
            for phase in options.phases:
                own = argparse.Namespace(**vars(options), phase=phase)
                if needs_baseline:
                    rows += ranks.on_first(lambda c=config, p=parallel, o=own: [measure(c, p, Ranks(), device, o)])
                rows.append(measure(config, parallel, ranks, device, own))
                if is_first():
                    print(json.dumps(rows[-1]), flush=True)
    return rows


def measure(
    config: TrainConfig, parallel: ParallelConfig, ranks: Ranks, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:  # fmt: skip
    """One layout's row."""
    own = with_sizes(config, options.micro_batch, options.accumulation * ranks.size, compiled=False)
    vocabulary = own.model.vocab_size or 50257
    own = dataclasses.replace(own, model=dataclasses.replace(own.model, vocab_size=vocabulary))
    length, rows = own.data.sequence_length, options.micro_batch * options.accumulation
    batch = random_batch(own.model, rows, length, seed=ranks.index)
    is_steady = options.phase == "steady"
    stepper = Stepper(own, steady_model(own, device) if is_steady else new_model(own, device), device, ranks)
    gc.collect()
    reset_peak(device)
    seconds, values = run_steps(stepper, batch, options.steps, knows_rows=is_steady)
    row = {
        "phase": options.phase,
        "router": own.model.moe.router_name,
        "ranks": ranks.size,
        "parallel": dataclasses.asdict(parallel) if ranks.size > 1 else None,
        "tokens_per_second": rows * length * ranks.size / statistics.median(seconds),
        "step_ms": [value * 1e3 for value in seconds],
        "peak_bytes": ranks.gather(peak_bytes(device)),
        "active_experts": (values["active"].sum() / values["tokens"].sum()).item() if "active" in values else None,
        "loss": values["lm_loss"].item(),
    }
    del stepper, values
    gc.collect()
    torch.cuda.empty_cache()
    return row


def new_model(config: TrainConfig, device: torch.device) -> ReMoEForCausalLM:
    """A fresh model, the same on all ranks."""
    torch.manual_seed(0)
    return fresh_model(config.model, device)


def steady_model(config: TrainConfig, device: torch.device) -> ReMoEForCausalLM:
    """A fresh model that routes as a trained one; the same on all ranks."""
    model = new_model(config, device)
    if config.model.num_moe_layers:
        length = config.data.sequence_length
        tokens_BS = random_batch(config.model, max(1, SETTLING_TOKENS // length), length, seed=99).tokens_BS
        steady.share_a_direction(model)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            steady.settle(model, tokens_BS.to(device))
    return model


def run_steps(
    stepper: Stepper, batch: Batch, steps: int, knows_rows: bool
) -> tuple[list[float], dict[str, Any]]:  # fmt: skip
    """Seconds of each step after the warm-up, whose last one tells how many rows the layers need; a run's first steps
    do not know, and wait for it.
    """
    values: dict[str, Any] = {}
    for step in range(1, WARM_UP + 1):
        values = stepper.run(batch, step)
    if knows_rows and stepper.device.type == "cuda" and "active_at_once" in values:
        stepper.row_capacities = [int(SPARE_ROWS * count) for count in values["active_at_once"].tolist()]
        values = stepper.run(batch, WARM_UP + 1)
    seconds = []
    for step in range(steps):
        synchronize(stepper.device)
        start = time.perf_counter()
        values = stepper.run(batch, WARM_UP + 2 + step)
        synchronize(stepper.device)
        seconds.append(time.perf_counter() - start)
    assert not bool(values.get("overflowed", False)), "a layer needed more rows than in the warm-up"
    return seconds, values


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


if __name__ == "__main__":
    main()
