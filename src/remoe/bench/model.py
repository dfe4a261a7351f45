"""Whole models in training: tokens a second of ReLU and Top-K in turn, memory of both phases, and transformers.

ReLU is measured twice: as it starts, with half of all gates open, and in its steady state, which `steady` sets. Top-K
shares all parameters but the routers with it, and both take optimizer steps in turn in one process, at a learning rate
of 0, so that drift of the machine's speed hits both and the routing stays.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from remoe.bench import steady
from remoe.bench.arms import Arm, OurArm, TransformersArm, collect_garbage, stepper_of, twin_stepper
from remoe.bench.clock import Clock
from remoe.bench.fresh import fresh_model, random_batch, twin_with_router
from remoe.bench.limits import measure_limits
from remoe.bench.profile import Kernel, profile_step
from remoe.bench.results import Results, Row, Show, first_line
from remoe.bench.shapes import LayerShape
from remoe.data import Batch
from remoe.errors import ConfigError
from remoe.model import ReMoEForCausalLM
from remoe.model.size import flops_per_token
from remoe.training.config import TrainConfig

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bf16 of the SXM cards, by a word in the device's name."""
STAGE_STEPS, RUN_STEPS = 110, 60_000
"""Stages I and II of ReMoE's runs (its figure 4 and the released log), and their whole length."""
DENSITY_TOLERANCE = 0.02
LOSS_TOLERANCE = 5e-3
PHASES = {"start": "half of all gates open", "steady": "k of E on average, and Top-K beside it"}
_FEWEST_TOKENS = 16384
"""Of a batch that has the density of all by itself."""
_BATCHES = 2
PEERS = {  # experts implementation (None: the library's choice) and precision
    "transformers": (None, "autocast"),
    "transformers_eager": ("eager", "autocast"),
    "transformers_bf16": (None, "bf16"),
    "transformers_bf16_eager": ("eager", "bf16"),
}


@dataclass(frozen=True, kw_only=True)
class ModelBench:
    """What to measure."""

    configs: dict[str, TrainConfig]
    """By name; `train.batch_size` is the accumulation times `train.micro_batch_size`."""
    peers: list[str]
    device: torch.device
    steps: int = 8
    phases: list[str] = field(default_factory=lambda: list(PHASES))
    profile: bool = False
    deadline_seconds: float | None = None
    path: Path | None = None
    show: Show | None = None


def bench_model(config: ModelBench) -> Results:
    """Measure every config; `results.check()` then raises where a loss or a density is not what it should be."""
    started = time.perf_counter()
    dtype = torch.bfloat16 if config.device.type == "cuda" else torch.float32
    limits = vars(measure_limits(Clock(config.device), dtype))
    about = {"dtype": str(dtype).removeprefix("torch."), "limits": limits, "peak_tflops": peak_tflops(config.device)}
    results = Results("model", config.path, config.show, **about)
    parts = (_ours, _peers) if "steady" in config.phases else (_ours,)
    for name, run in config.configs.items():
        for part in parts:
            if config.deadline_seconds is not None and time.perf_counter() - started > config.deadline_seconds:
                results.add({"model": name, "note": "left out: deadline"})
                continue
            part(config, name, run, results)
            collect_garbage()
    results.write()
    return results


def with_sizes(config: TrainConfig, micro_batch: int, accumulation: int, compiled: bool) -> TrainConfig:
    """The run with these sizes, and nothing that would change its weights."""
    train = dataclasses.replace(
        config.train, micro_batch_size=micro_batch, batch_size=micro_batch * accumulation, compile=compiled
    )
    optimizer = dataclasses.replace(config.optimizer, lr=0.0, min_lr=0.0)
    return dataclasses.replace(config, train=train, optimizer=optimizer)


def peak_tflops(device: torch.device) -> float | None:
    """The device's dense bf16 peak; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for word, peak in PEAK_TFLOPS.items() if word in name), None)


def _ours(bench: ModelBench, name: str, config: TrainConfig, results: Results) -> None:
    device = bench.device
    model = fresh_model(_relu(config), device)
    batches = _batches(config)
    relu = OurArm("relu", stepper_of(_with_router(config, "relu"), model, device), batches)
    start = None
    if "start" in bench.phases:
        start = _measured(bench, config, [relu], 2)[0]
        results.add({"model": name, "phase": "start", **start})
    if "steady" not in bench.phases:
        return
    twin = twin_with_router(model, "topk")
    topk = OurArm("topk", twin_stepper(_with_router(config, "topk"), twin, relu.stepper), batches)
    steady.share_a_direction(model)
    wrong: list[list[str]] = []
    for arm in (relu, topk):
        _settle(arm, config, device)
        arm.settle_rows()
        wrong.append(_wrong_loss(arm, config))
    rows = _measured(bench, config, [relu, topk], bench.steps)
    wrong[0] += _wrong_density(rows[0], config)
    measured = [
        {"model": name, "phase": "steady", **row} | _mismatches(name, texts)
        for row, texts in zip(rows, wrong, strict=True)
    ]
    for row in measured:
        results.add(row)
    ratios = _ratios(start, *rows) | _mismatches(name, [text for texts in wrong for text in texts])
    results.add({"model": name, "candidate": "relu over topk", "kind": "ratio", **ratios})
    if bench.profile:
        for row, arm in zip(measured, (relu, topk), strict=True):
            row["profile"] = _profile(bench, config, arm)
        results.write()


def _mismatches(name: str, texts: Sequence[str]) -> Row:
    return {"mismatches": [f"{name}, {text}" for text in texts]} if texts else {}


def _batches(config: TrainConfig) -> list[Batch]:
    """Two, so that counts vary from step to step; one where a batch is too small to have the density of both."""
    length, size = config.data.sequence_length, config.train.batch_size
    seeds = range(_BATCHES if size * length >= _FEWEST_TOKENS else 1)
    return [random_batch(config.model, size, length, seed) for seed in seeds]


def _peers(bench: ModelBench, name: str, config: TrainConfig, results: Results) -> None:
    for peer in bench.peers:
        results.add({"model": name, "phase": "steady", **_peer_row(bench, peer, config)})
        collect_garbage()


def _peer_row(bench: ModelBench, peer: str, config: TrainConfig) -> Row:
    """The peer at our micro-batch, or the largest half of it that fits."""
    while True:
        try:
            return _measured_peer(bench, peer, config)
        except torch.OutOfMemoryError:
            micro_batch = config.train.micro_batch
        except Exception as error:  # noqa: BLE001 - a peer may fail in any way; ours still counts
            return {"candidate": peer, "kind": "peer", "error": first_line(error)}
        collect_garbage()
        if micro_batch == 1:
            return {"candidate": peer, "kind": "peer", "error": "out of memory with one sequence"}
        train = dataclasses.replace(config.train, micro_batch_size=micro_batch // 2)
        config = dataclasses.replace(config, train=train)


def _measured_peer(bench: ModelBench, peer: str, config: TrainConfig) -> Row:
    batch = random_batch(config.model, config.train.batch_size, config.data.sequence_length, seed=0)
    arm = TransformersArm(peer, config, batch, *PEERS[peer])
    row = _measured(bench, config, [arm], bench.steps)[0]
    return row | {"kind": "peer", "experts_implementation": arm.implementation}


def _measured(bench: ModelBench, config: TrainConfig, arms: Sequence[Arm], steps: int) -> list[Row]:
    """Steps of all arms in turn, after two of each that are not counted."""
    device = bench.device
    firsts = [_seconds(arm, device)[0] for arm in arms]
    for arm in arms:
        arm.step()
    peaks = [_peak_bytes(arm, device) for arm in arms]
    times: list[list[float]] = [[] for _ in arms]
    values: list[list[dict[str, Any]]] = [[] for _ in arms]
    for _ in range(steps):
        for index, arm in enumerate(arms):
            seconds, measured = _seconds(arm, device)
            times[index].append(seconds)
            values[index].append(measured)
    return [
        {"candidate": arm.name, "kind": "ours", "first_step_seconds": first, "peak_bytes": peak}
        | _speeds(bench, config, seconds)
        | _density(measured)
        for arm, first, peak, seconds, measured in zip(arms, firsts, peaks, times, values, strict=True)
    ]


def _profile(bench: ModelBench, config: TrainConfig, arm: Arm) -> list[Kernel]:
    moe = config.model.moe
    shape = LayerShape(
        name="",
        num_tokens=config.train.micro_batch * config.data.sequence_length,
        hidden_size=moe.hidden_size,
        expert_size=moe.expert_size,
        num_experts=moe.routed_experts,
        top_k=moe.routed_top_k,
    )
    bytes_a_number = 2 if config.train.precision == "bf16" else 4
    return profile_step(arm.step, shape, Clock(bench.device), bytes_a_number)


def _speeds(bench: ModelBench, config: TrainConfig, seconds: list[float]) -> Row:
    tokens = config.train.batch_size * config.data.sequence_length
    step = statistics.median(seconds)
    row: Row = {
        "step_ms": step * 1e3,
        "all_step_ms": [value * 1e3 for value in seconds],
        "tokens_per_second": tokens / step,
        "micro_batch": config.train.micro_batch,
        "accumulation": config.train.batch_size // config.train.micro_batch,
        "sequence_length": config.data.sequence_length,
    }
    peak = peak_tflops(bench.device)
    flops = flops_per_token(config.model, config.data.sequence_length) * tokens / step
    return row | {"model_tflops": flops / 1e12} | ({} if peak is None else {"mfu": flops / 1e12 / peak})


def _density(values: list[dict[str, Any]]) -> Row:
    found = [sum(step["active"]) / sum(step["total"]) for step in values if "active" in step]
    return {"density": statistics.fmean(found)} if found else {}


def _seconds(arm: Arm, device: torch.device) -> tuple[float, dict[str, Any]]:
    _synchronize(device)
    start = time.perf_counter()
    values = arm.step()
    _synchronize(device)
    return time.perf_counter() - start, values


def _peak_bytes(arm: Arm, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    arm.step()
    _synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _settle(arm: OurArm, config: TrainConfig, device: torch.device) -> None:
    tokens_BS = torch.cat([batch.tokens_BS for batch in arm.batches]).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
        steady.settle(_native(arm), tokens_BS)


def _wrong_loss(arm: OurArm, config: TrainConfig) -> list[str]:
    """Where the step's loss differs from the eager model's in fp32, on one micro-batch."""
    part = Batch(*(values[: config.train.micro_batch] for values in arm.batches[0]))
    found = arm.loss_on(part)
    with arm.in_fp32():
        wanted = _plain_loss(_native(arm), part, arm.stepper.device)
    if abs(found - wanted) <= LOSS_TOLERANCE * wanted:
        return []
    return [f"{arm.name}: the step's loss is {found:.5f}, the plain model's in fp32 {wanted:.5f}"]


@torch.no_grad()
def _plain_loss(model: ReMoEForCausalLM, batch: Batch, device: torch.device) -> float:
    """With one matrix product an expert, a sequence at a time: the logits of all would be the largest tensor here."""
    with steady.experts_with(steady.settable_layers(model), kernels="plain"):
        losses = [
            F.cross_entropy(model(tokens_S[None].to(device)).logits[0].float(), labels_S.to(device))
            for tokens_S, labels_S in zip(batch.tokens_BS, batch.labels_BS, strict=True)
        ]
    return float(torch.stack(losses).mean())


def _wrong_density(row: Row, config: TrainConfig) -> list[str]:
    wanted = config.model.moe.routed_top_k / config.model.moe.routed_experts
    if abs(row["density"] / wanted - 1) <= DENSITY_TOLERANCE:
        return []
    return [f"relu: density is {row['density']:.4f}, must be within {DENSITY_TOLERANCE:.0%} of k/E = {wanted:.4f}"]


def _ratios(start: Row | None, relu: Row, topk: Row) -> Row:
    """Speeds as medians of paired ratios; what Stages I and II add to a run if all their steps are like the first."""
    pairs = zip(topk["all_step_ms"], relu["all_step_ms"], strict=True)
    row: Row = {"speed": statistics.median(other / own for other, own in pairs)}
    if start is None:
        return row
    row["start_step"] = start["step_ms"] / relu["step_ms"]
    row["stages_extra_time"] = extra_time(row["start_step"])
    if relu["peak_bytes"] is not None:
        row["start_peak"] = start["peak_bytes"] / relu["peak_bytes"]
        row["start_peak_over_topk"] = start["peak_bytes"] / topk["peak_bytes"]
    return row


def extra_time(start_step: float, steps: float = STAGE_STEPS) -> float:
    """The share that so many steps like the first, which takes `start_step` steady ones, add to a run."""
    return max(0.0, start_step - 1) * steps / RUN_STEPS


def _relu(config: TrainConfig) -> Any:
    if not config.model.num_moe_layers:
        raise ConfigError("model.moe_layers is none, must have experts to compare routers")
    return dataclasses.replace(config.model, router="relu")


def _with_router(config: TrainConfig, router: str) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, router=router))


def _native(arm: OurArm) -> ReMoEForCausalLM:
    model: Any = arm.stepper.model
    return model


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
