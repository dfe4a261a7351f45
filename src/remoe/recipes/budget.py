"""Equal FLOPs instead of equal steps: what a run computed, as measured, and in how many steps it reaches a budget."""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from remoe.recipes.plan import Trial
from remoe.training.metrics import LATE_SHARE

if TYPE_CHECKING:
    from remoe.training import Run


class Spent(NamedTuple):
    """FLOPs of a run up to a step."""

    step: int
    flops: float


def training_flops(run: "Run", step: int | None = None) -> float:
    """Forward and backward FLOPs up to a step (None: all), with the experts active in each (as logged) and routers."""
    return [point for point in _curve(run) if step is None or point.step <= step][-1].flops


def steps_within(run: "Run", budget: float) -> int:
    """The number of steps that costs `budget`, from the run's own curve and beyond its end at its late rate."""
    curve = _curve(run)
    for before, after in pairwise(curve):
        if after.flops >= budget:
            share = (budget - before.flops) / (after.flops - before.flops)
            return max(1, round(before.step + share * (after.step - before.step)))
    last = curve[-1]
    late = next(point for point in curve if point.step >= (1 - LATE_SHARE) * last.step)
    rate = (last.flops - late.flops) / (last.step - late.step) if last.step > late.step else last.flops / last.step
    return round(last.step + (budget - last.flops) / rate)


def at_equal_flops(planned: Sequence[Trial], root: Path) -> list[Trial]:
    """The trials again, each as long as it takes to compute what the first router of its seed did.

    Needs the finished runs of `planned`, all of equal steps. A trial that needs no other number of steps stays itself.
    """
    from remoe.training import Run

    first: dict[int, float] = {}
    matched = []
    for trial in planned:
        run = Run.open(root / trial.config.name)
        budget = first.setdefault(trial.seed, training_flops(run))
        matched.append(_with_steps(trial, steps_within(run, budget)))
    return matched


def _with_steps(trial: Trial, steps: int) -> Trial:
    if steps == trial.config.train.steps:
        return trial
    loop = dataclasses.replace(trial.config.train, steps=steps)
    config = dataclasses.replace(trial.config, name=f"{trial.config.name}-equal-flops", train=loop)
    return dataclasses.replace(trial, config=config)


def _curve(run: "Run") -> list[Spent]:
    """From step 0 on, one point a logged step; what was measured there stands for the steps since the one before."""
    from remoe.model.size import training_flops_per_token

    config, length = run.config, run.config.data.sequence_length
    idle = training_flops_per_token(config.model, length, 0)
    an_expert = training_flops_per_token(config.model, length, 1) - idle
    return list(_summed(run.metrics(), idle, an_expert))


def _summed(records: Sequence[dict], idle: float, an_expert: float) -> Iterator[Spent]:
    point, tokens = Spent(0, 0.0), 0
    yield point
    for record in records:
        per_token = idle + an_expert * (record.get("active_experts") or 0)
        point = Spent(record["step"], point.flops + (record["tokens"] - tokens) * per_token)
        tokens = record["tokens"]
        yield point
