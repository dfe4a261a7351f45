"""Training and validation loss of all runs over the tokens they have seen (ReMoE Fig. 5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from remoe.analysis.drawing import INK, POINTS, chart, compact_ticks, line
from remoe.analysis.figure import Chart, Figure, run_keys
from remoe.analysis.metrics import smooth
from remoe.analysis.record import RunRecord, places
from remoe.analysis.table import Table


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """One run's losses in nats per token; `train_smooth` is a mean over the last fiftieth of the run."""

    run: str
    place: int
    steps: np.ndarray
    tokens: np.ndarray
    train: np.ndarray
    train_smooth: np.ndarray
    valid_tokens: np.ndarray
    valid: np.ndarray


def numbers(runs: Sequence[RunRecord]) -> list[LossCurve]:
    """The curves of all runs, dense ones included."""
    return [_curve(run, place) for place, run in zip(places(runs), runs, strict=True)]


def differences(curves: Sequence[LossCurve]) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Smoothed training loss minus the first run's, on the steps that both logged: (place, tokens, difference).

    Runs that see the same batches differ by far less than either changes from batch to batch.
    """
    first, found = curves[0], []
    for curve in curves[1:]:
        _, ours, theirs = np.intersect1d(curve.steps, first.steps, return_indices=True)
        if len(ours) > 1:
            apart = curve.train[ours] - first.train[theirs]
            found.append((curve.place, curve.tokens[ours], smooth(apart, max(1, len(apart) // 20))))
    return found


def draw(curves: Sequence[LossCurve]) -> list[Chart]:
    """Training, validation and, for two or more runs, the difference to the first."""
    charts = [
        Chart("Training loss (smoothed; raw behind it)", chart(_paint_train(curves), label="loss curves: training")),
        Chart("Validation loss", chart(_paint_valid(curves), label="loss curves: validation")),
    ]
    apart = differences(curves)
    if apart:
        paint = _paint_differences(apart)
        caption = f"Training loss minus that of {curves[0].run}"
        charts.append(Chart(caption, chart(paint, label="loss curves: differences")))
    return charts


def figure(runs: Sequence[RunRecord]) -> Figure | None:
    """The figure, or None where no run logged a loss."""
    curves = numbers(runs)
    if not any(len(curve.steps) for curve in curves):
        return None
    charts = draw(curves)
    return Figure(
        key="loss-curves",
        title="Loss curves",
        says="How far each model's loss has fallen after how many training tokens; lower is better.",
        source="ReMoE, Figure 5",
        charts=tuple(charts),
        columns=len(charts),
        legend=run_keys(runs),
        table=_table(runs),
    )


def _curve(run: RunRecord, place: int) -> LossCurve:
    steps, tokens, train = run.metrics.series("step", "tokens", "lm_loss")
    valid_tokens, valid = run.metrics.series("tokens", "valid_loss")
    return LossCurve(
        run=run.name,
        place=place,
        steps=steps,
        tokens=tokens,
        train=train,
        train_smooth=smooth(train),
        valid_tokens=valid_tokens,
        valid=valid,
    )


def _paint_train(curves: Sequence[LossCurve]) -> Any:
    def paint(axes: Any) -> None:
        for curve in curves:
            line(axes, curve.tokens, curve.train, curve.place, alpha=0.22, linewidth=0.8, linestyle="-")
        for curve in curves:
            line(axes, curve.tokens, curve.train_smooth, curve.place)
        _frame(axes, [curve.train_smooth for curve in curves])

    return paint


def _paint_valid(curves: Sequence[LossCurve]) -> Any:
    def paint(axes: Any) -> None:
        for curve in curves:
            style = {"marker": POINTS[curve.place % len(POINTS)], "markersize": 4.5 if len(curve.valid) <= 30 else 0}
            line(axes, curve.valid_tokens, curve.valid, curve.place, **style)
        _frame(axes, [curve.valid for curve in curves])

    return paint


def _paint_differences(apart: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> Any:
    def paint(axes: Any) -> None:
        axes.axhline(0, color=INK, linewidth=1)
        for place, tokens, difference in apart:
            line(axes, tokens, difference, place)
        later = np.concatenate([difference[len(difference) // 10 :] for _, _, difference in apart])
        reach = max(1e-3, 1.15 * float(np.abs(later).max()))
        axes.set_ylim(-reach, reach)
        axes.set_xlabel("tokens")
        axes.set_ylabel("difference (nats)")
        compact_ticks(axes.xaxis)

    return paint


def _frame(axes: Any, losses: Sequence[np.ndarray]) -> None:
    """Axes that show the part after the first steep fall, from which the runs can be told apart."""
    losses = [values for values in losses if len(values)]
    if losses:
        low = min(values.min() for values in losses)
        high = max(values[len(values) // 20 :].max() for values in losses)
        margin = max(0.02, 0.06 * (high - low))
        axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    compact_ticks(axes.xaxis)


def _table(runs: Sequence[RunRecord]) -> Table:
    rows = [
        (run.name, row["step"], row.get("tokens"), row.get("lm_loss"), row.get("valid_loss"))
        for run in runs
        for row in run.metrics.rows
    ]
    return Table(columns=("run", "step", "tokens", "lm_loss", "valid_loss"), rows=tuple(rows))
