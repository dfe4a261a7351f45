"""Sparsity of each MoE layer, over training and at its end (ReMoE Fig. 8d)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from remoe.analysis.drawing import (
    INK,
    POINTS,
    chart,
    compact_ticks,
    heat_colour,
    heat_step,
    line,
    series_colour,
    whole_ticks,
)
from remoe.analysis.figure import Chart, Figure, Key, run_key
from remoe.analysis.record import RunRecord, places
from remoe.analysis.table import Table

END_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class LayerSparsity:
    """One run's sparsity by step and MoE layer, and its mean over the last tenth of the steps."""

    run: str
    place: int
    target: float
    steps: np.ndarray
    sparsity_NL: np.ndarray
    end_L: np.ndarray


def numbers(runs: Sequence[RunRecord]) -> list[LayerSparsity]:
    """The runs that logged it."""
    found = []
    for place, run in zip(places(runs), runs, strict=True):
        steps, sparsity_NL = run.metrics.layers("sparsity")
        if sparsity_NL.size == 0:
            continue
        end_L = sparsity_NL[steps >= (1 - END_SHARE) * steps[-1]].mean(0)
        found.append(
            LayerSparsity(
                run=run.name, place=place, target=run.target_sparsity, steps=steps, sparsity_NL=sparsity_NL, end_L=end_L
            )
        )
    return found


def draw(layers: Sequence[LayerSparsity]) -> list[Chart]:
    """A chart of curves for each run, and one of the values at the end."""
    over_training = [
        Chart(f"{run.run}: over training", chart(_paint_training(run), label=f"layer sparsity: {run.run}"))
        for run in layers
    ]
    end = chart(_paint_end(layers), label="layer sparsity: at the end")
    return [*over_training, Chart("At the end (mean of the last tenth)", end)]


def figure(runs: Sequence[RunRecord]) -> Figure | None:
    """The figure, or None where no run routes."""
    layers = numbers(runs)
    if not layers:
        return None
    charts = draw(layers)
    deepest = layers[0].sparsity_NL.shape[1] - 1
    return Figure(
        key="layer-sparsity",
        title="Sparsity per layer",
        says="The share of experts that each layer leaves out; the target holds for all layers together.",
        source="ReMoE, Figure 8d",
        charts=tuple(charts),
        columns=min(3, len(charts)),
        legend=(
            Key("first MoE layer", f"h{heat_step(_depth(0, deepest))}"),
            Key("last MoE layer", f"h{heat_step(_depth(deepest, deepest))}"),
            Key("target", "ink", "dash"),
            *(run_key(run.run, run.place, "dot") for run in layers),
        ),
        table=_table(layers),
    )


def _depth(layer: int, deepest: int) -> float:
    return 0.4 + 0.59 * layer / max(1, deepest)


def _paint_training(run: LayerSparsity) -> Any:
    def paint(axes: Any) -> None:
        deepest = run.sparsity_NL.shape[1] - 1
        for layer, values in enumerate(run.sparsity_NL.T):
            style = {"color": heat_colour(_depth(layer, deepest)), "linestyle": "-", "linewidth": 1.3}
            line(axes, run.steps, values, 0, **style)
        axes.axhline(run.target, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
        axes.set_ylim(min(0.4, float(np.nanmin(run.sparsity_NL)) - 0.02), 1.01)
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.set_ylabel("sparsity")
        compact_ticks(axes.xaxis)

    return paint


def _paint_end(layers: Sequence[LayerSparsity]) -> Any:
    def paint(axes: Any) -> None:
        for run in layers:
            colour, point = series_colour(run.place), POINTS[run.place % len(POINTS)]
            axes.plot(run.end_L, color=colour, marker=point, markersize=6, linewidth=1, alpha=0.95)
        axes.axhline(layers[0].target, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
        low = min(float(run.end_L.min()) for run in layers)
        axes.set_ylim(min(low, layers[0].target) - 0.05, 1.01)
        axes.set_xlabel("MoE layer")
        axes.set_ylabel("sparsity")
        whole_ticks(axes.xaxis, max(len(run.end_L) for run in layers))

    return paint


def _table(layers: Sequence[LayerSparsity]) -> Table:
    depth = max(run.sparsity_NL.shape[1] for run in layers)
    rows: list[tuple[Any, ...]] = []
    for run in layers:
        padding = (None,) * (depth - run.sparsity_NL.shape[1])
        rows += [
            (run.run, int(step), *map(float, values), *padding)
            for step, values in zip(run.steps, run.sparsity_NL, strict=True)
        ]
    columns = ("run", "step", *(f"layer_{layer}" for layer in range(depth)))
    return Table(columns=columns, rows=tuple(rows))
