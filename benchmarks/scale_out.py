"""Tokens a second and peak memory of one model on several GPUs, layout by layout, beside one GPU in the same call.

ReLU and Top-K each, in the steady state that `remoe.bench.steady` sets or as they start, at a learning rate of 0, on
random tokens: each rank has the same micro-batches in every layout. Started by torchrun; the first process writes the
results. Example:

    torchrun --standalone --nproc-per-node 4 benchmarks/scale_out.py remoe-469m-relu --expert 1 4 --compile \
        --micro-batch 8 --accumulation 4 --output results/scale_out_469m.json
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from remoe.bench import machine, steady
from remoe.bench.arms import OurArm, collect_garbage
from remoe.bench.clock import Clock
from remoe.bench.fresh import fresh_model, random_batch
from remoe.bench.model import peak_tflops, with_sizes
from remoe.bench.profile import kernels_of
from remoe.data import Batch
from remoe.distributed import launch
from remoe.distributed.collectives import all_gather, reduce_scatter
from remoe.distributed.config import ParallelConfig, resolve_parallel
from remoe.distributed.ranks import Ranks
from remoe.distributed.world import is_first, world_size
from remoe.model import ReMoEForCausalLM
from remoe.model.size import flops_per_token
from remoe.recipes import read_config
from remoe.training.config import TrainConfig
from remoe.training.setup import pick_device
from remoe.training.step import Stepper

START = "start: a fresh model, half of whose gates are open with ReLU routing: its peak memory is the run's"
WARM_UP = 2
KERNELS = 24
"""Of a profile."""
LINK_BYTES, LINK_CALLS = 1 << 28, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a recipe's name or a YAML file")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--expert", nargs="+", type=int, default=[1], help="expert-parallel sizes to measure")
    parser.add_argument("--sharded", nargs="+", default=["parameters"], help="values of parallel.sharded to measure")
    parser.add_argument("--routers", nargs="+", default=["relu", "topk"])
    parser.add_argument("--phases", nargs="+", default=["steady"], choices=["steady", "start"], help=START)
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences of one rank's forward pass")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of one rank's step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="train.compile: on one GPU the step is one graph then")
    parser.add_argument("--profile", action="store_true", help="add the kernels of one more step of the first rank")
    parser.add_argument("--no-baseline", action="store_true", help="for models that one GPU cannot hold")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = launch.local_device(pick_device("auto"))
    rows = []
    with launch.process_group(device, 600):
        about = machine.describe() | {"links_gb_per_second": link_rates(device) if world_size() > 1 else {}}
        for row in measure_all(options, device):
            rows.append(row)
            if is_first():
                print(json.dumps({key: value for key, value in row.items() if key != "profile"}), flush=True)
            if is_first() and options.output is not None:  # anew with each row: what is measured stays
                options.output.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


def link_rates(device: torch.device) -> dict[str, float]:
    """What leaves each rank in a second, in GB, in collectives over so many bytes of all ranks together."""
    ranks = world_size()
    whole = torch.zeros(LINK_BYTES // ranks * ranks, dtype=torch.int8, device=device)
    own = torch.zeros(len(whole) // ranks, dtype=torch.int8, device=device)
    calls = {
        "all_gather": lambda: all_gather(whole, own),
        "reduce_scatter": lambda: reduce_scatter(own, whole),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(whole), whole),
    }
    rates = {}
    for name, call in calls.items():
        call()
        synchronize(device)
        start = time.perf_counter()
        for _ in range(LINK_CALLS):
            call()
        synchronize(device)
        rates[name] = LINK_CALLS * (len(whole) - len(own)) / (time.perf_counter() - start) / 1e9
    return rates


def measure_all(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Every router in every layout; the baseline on the first GPU, while the others wait."""
    for router in options.routers:
        config = read_config(options.config, [*options.overrides, f"model.router={router}"])
        layouts = list(product(options.expert, options.sharded))
        for expert, sharded in layouts:
            layout = dataclasses.replace(config.parallel, expert=expert, sharded=sharded)
            parallel = resolve_parallel(layout, world_size())
            ranks = launch.join(parallel, device)
            needs_baseline = (expert, sharded) == layouts[0] and world_size() > 1 and not options.no_baseline
            for phase in options.phases:
                own = argparse.Namespace(**vars(options), phase=phase)
                if needs_baseline:
                    yield ranks.on_first(lambda c=config, p=parallel, o=own: measure(c, p, Ranks(), device, o))
                yield measure(config, parallel, ranks, device, own)


def measure(
    config: TrainConfig, parallel: ParallelConfig, ranks: Ranks, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:  # fmt: skip
    """One layout's row."""
    own = with_sizes(config, options.micro_batch, options.accumulation * ranks.size, compiled=options.compile)
    vocabulary = own.model.vocab_size or 50257
    own = dataclasses.replace(own, model=dataclasses.replace(own.model, vocab_size=vocabulary))
    length, rows = own.data.sequence_length, options.micro_batch * options.accumulation
    is_steady = options.phase == "steady"
    model = steady_model(own, device, rows) if is_steady else new_model(own, device)
    stepper = Stepper(own, model, device, ranks)
    arm = OurArm(own.model.moe.router_name, stepper, own_batches(own, rows, ranks.index))
    collect_garbage()
    reset_peak(device)
    if is_steady:
        arm.settle_rows()
    seconds, values = run_steps(arm, options.steps)
    row = {
        "phase": options.phase,
        "router": arm.name,
        "ranks": ranks.size,
        "parallel": dataclasses.asdict(parallel) if ranks.size > 1 else None,
        "tokens_per_second": rows * length * ranks.size / statistics.median(seconds),
        "step_ms": [value * 1e3 for value in seconds],
        "peak_bytes": ranks.gather(peak_bytes(device)),
        "active_experts": sum(values["active"]) / sum(values["tokens"]) if "active" in values else None,
        "loss": values["lm_loss"],
    }
    peak = peak_tflops(device)
    if peak is not None:
        row["mfu"] = flops_per_token(own.model, length) * row["tokens_per_second"] / ranks.size / peak / 1e12
    if options.profile:
        row["profile"] = kernels_of(arm.step, Clock(device))[:KERNELS]
    del stepper, arm
    collect_garbage()
    return row


def own_batches(config: TrainConfig, rows: int, index: int) -> list[Batch]:
    """A rank's rows of two steps, so that its counts vary."""
    seeds = range(2 * index, 2 * index + 2)
    return [random_batch(config.model, rows, config.data.sequence_length, seed) for seed in seeds]


def new_model(config: TrainConfig, device: torch.device) -> ReMoEForCausalLM:
    """A fresh model, the same on all ranks."""
    torch.manual_seed(0)
    return fresh_model(config.model, device)


def steady_model(config: TrainConfig, device: torch.device, rows: int) -> ReMoEForCausalLM:
    """A fresh model that routes as a trained one, on the first rank's tokens; the same on all ranks."""
    model = new_model(config, device)
    if config.model.num_moe_layers:
        tokens_BS = torch.cat([batch.tokens_BS for batch in own_batches(config, rows, 0)])
        steady.share_a_direction(model)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            steady.settle(model, tokens_BS.to(device))
    return model


def run_steps(arm: OurArm, steps: int) -> tuple[list[float], dict[str, Any]]:
    """Seconds of each step after the warm-up, and what the last one that is known to count measured."""
    for _ in range(WARM_UP):
        arm.step()
    seconds, values = [], {}
    for _ in range(steps):
        synchronize(arm.stepper.device)
        start = time.perf_counter()
        values = arm.step()
        synchronize(arm.stepper.device)
        seconds.append(time.perf_counter() - start)
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
