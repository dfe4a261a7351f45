"""How much routing changes from one training step to the next (ReMoE Fig. 10)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from remoe.analysis.drawing import chart, compact_ticks, line
from remoe.analysis.figure import Chart, Figure, run_key
from remoe.analysis.metrics import smooth
from remoe.analysis.record import RunRecord, places
from remoe.analysis.table import Table


@dataclass(frozen=True, kw_only=True)
class Flips:
    """One run's flip rate (share of switches that changed) and flip count (per token and layer: rate x E)."""

    run: str
    place: int
    steps: np.ndarray
    rate: np.ndarray
    count: np.ndarray


def numbers(runs: Sequence[RunRecord]) -> list[Flips]:
    """The runs that measured it."""
    found = []
    for place, run in zip(places(runs), runs, strict=True):
        steps, rate, count = run.metrics.series("step", "flip_rate", "flip_count")
        if len(steps):
            found.append(Flips(run=run.name, place=place, steps=steps, rate=rate, count=count))
    return found


def draw(flips: Sequence[Flips]) -> list[Chart]:
    """Rate and count over training."""
    return [
        Chart("Flip rate", chart(_paint(flips, "rate", "share of switches"), label="flips: rate")),
        Chart("Flip count", chart(_paint(flips, "count", "flips per token and layer"), label="flips: count")),
    ]


def figure(runs: Sequence[RunRecord]) -> Figure | None:
    """The figure, or None where no run measured flips."""
    flips = numbers(runs)
    if not flips:
        return None
    return Figure(
        key="flips",
        title="Flips",
        says=(
            "How many (token, expert) switches one training step turns on or off, on a fixed set of tokens; fewer "
            "means steadier routing. A Top-1 token that changes its expert counts as two."
        ),
        source="ReMoE, Figure 10",
        charts=tuple(draw(flips)),
        legend=tuple(run_key(run.run, run.place) for run in flips),
        table=_table(flips),
    )


def _paint(flips: Sequence[Flips], quantity: str, unit: str) -> Any:
    def paint(axes: Any) -> None:
        for run in flips:
            values = getattr(run, quantity)
            line(axes, run.steps, values, run.place, alpha=0.25, linewidth=0.8, linestyle="-")
            line(axes, run.steps, smooth(values, max(1, len(values) // 20)), run.place)
        later = [getattr(run, quantity)[len(run.steps) // 20 :].max() for run in flips]
        axes.set_ylim(0, 1.1 * max(1e-6, *later))
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        compact_ticks(axes.xaxis)

    return paint


def _table(flips: Sequence[Flips]) -> Table:
    rows = [
        (run.run, int(step), float(rate), float(count))
        for run in flips
        for step, rate, count in zip(run.steps, run.rate, run.count, strict=True)
    ]
    return Table(columns=("run", "step", "flip_rate", "flip_count"), rows=tuple(rows))
