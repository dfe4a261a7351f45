"""The three stages of ReLU routing: dense, sparsifying, on target (ReMoE Fig. 4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from remoe.analysis.drawing import BAND, INK, MUTED, chart, compact_ticks, line, log_scale
from remoe.analysis.figure import Chart, Figure, Key
from remoe.analysis.record import RunRecord
from remoe.analysis.table import Table

PAPER_SETTLING_STEPS = 110
"""ReMoE's settling time at an initial coefficient of 1e-8 and a multiplier of 1.2 (182M, E=8, k=1)."""

VISIBLE_SHARE = 1e-3
SPARSITY_RISE = 0.05


@dataclass(frozen=True, kw_only=True)
class Stages:
    """One run's sparsity, coefficient and losses, and the steps at which Stage I and Stage II end (None: never)."""

    run: str
    target: float
    steps: np.ndarray
    sparsity: np.ndarray
    coef: np.ndarray
    l1: np.ndarray
    lm_loss: np.ndarray
    stage_1_end: int | None
    stage_2_end: int | None
    late_mean: float
    late_std: float

    @property
    def term(self) -> np.ndarray:
        """Coefficient times L1: what is added to the loss."""
        return self.coef * self.l1


def numbers(runs: Sequence[RunRecord]) -> list[Stages]:
    """The runs whose coefficient adapts, each with its boundaries."""
    return [stages for stages in map(_stages, runs) if stages is not None]


def boundaries(steps: np.ndarray, sparsity: np.ndarray, term: np.ndarray, lm_loss: np.ndarray, target: float) -> Any:
    """The steps at which Stages I and II end, None for one that does not.

    Stage I ends when coefficient * L1 > 1e-3 * lm_loss or the sparsity is 0.05 above where it began, whichever is
    first; Stage II ends at the first step on which the sparsity reaches its target. (The paper gives no criterion.)
    """
    on_target = np.flatnonzero(sparsity >= target)
    leaves = np.flatnonzero((term > VISIBLE_SHARE * lm_loss) | (sparsity > sparsity[0] + SPARSITY_RISE))
    second = int(steps[on_target[0]]) if len(on_target) else None
    first = int(steps[leaves[0]]) if len(leaves) else None
    if first is not None and second is not None:
        first = min(first, second)
    return first, second


def settled(stages: Stages) -> str:
    """How long Stages I and II took, beside the paper's number."""
    paper = f"the paper's took {PAPER_SETTLING_STEPS} from 1e-8"
    if stages.stage_2_end is None:
        return f"{stages.run} has not reached its target sparsity of {stages.target:.3f} ({paper})."
    return (
        f"{stages.run} settled after {stages.stage_2_end:,} steps from a coefficient of {stages.coef[0]:.2g} "
        f"({paper}); over the last quarter its sparsity is {stages.late_mean:.4f} ± "
        f"{stages.late_std:.4f}, target {stages.target:.4f}."
    )


def draw(stages: Stages) -> list[Chart]:
    """Sparsity; coefficient and L1 term; LM loss and what the L1 term adds to it."""
    label = f"stages: {stages.run}"
    return [
        Chart(
            f"{stages.run}: sparsity",
            chart(_sparsity(stages), label=f"{label} sparsity", **_SPLIT),
            (Key("sparsity", "c0"), Key("target", "ink", "dash")),
        ),
        Chart(
            f"{stages.run}: what drives it",
            chart(_coefficient(stages), label=f"{label} coefficient", **_SPLIT),
            (Key("coefficient", "c0"), Key("L1 term", "c1")),
        ),
        Chart(
            f"{stages.run}: the parts of the loss",
            chart(_losses(stages), label=f"{label} losses", **_SPLIT),
            (Key("LM loss", "c0"), Key("coefficient × L1", "c1")),
        ),
    ]


def figure(runs: Sequence[RunRecord]) -> Figure | None:
    """The figure, or None where no run adapts a coefficient."""
    all_stages = numbers(runs)
    if not all_stages:
        return None
    return Figure(
        key="stages",
        title="The three stages",
        says=(
            "Routing starts dense (I); the coefficient grows until experts switch off (II); then sparsity stays on "
            "target (III). The left part of each chart magnifies the first steps."
        ),
        source="ReMoE, Figures 3 and 4",
        charts=tuple(part for stages in all_stages for part in draw(stages)),
        columns=3,
        legend=(Key("Stage II", "band", "band"),),
        notes=tuple(settled(stages) for stages in all_stages),
        table=_table(all_stages),
    )


_SPLIT = {"ncols": 2, "sharey": True, "gridspec_kw": {"width_ratios": [3, 2]}}


def _stages(run: RunRecord) -> Stages | None:
    steps, sparsity, coef, l1, lm_loss = run.metrics.series(
        "step", "sparsity", "sparsity_coef", "sparsity_l1", "lm_loss"
    )
    if not len(steps) or not (coef * l1).any():
        return None
    late = sparsity[steps > 0.75 * steps[-1]]
    first, second = boundaries(steps, sparsity, coef * l1, lm_loss, run.target_sparsity)
    return Stages(
        run=run.name,
        target=run.target_sparsity,
        steps=steps,
        sparsity=sparsity,
        coef=coef,
        l1=l1,
        lm_loss=lm_loss,
        stage_1_end=first,
        stage_2_end=second,
        late_mean=float(late.mean()),
        late_std=float(late.std()),
    )


def _sparsity(stages: Stages) -> Any:
    def paint(parts: Any) -> None:
        for axes in parts:
            line(axes, stages.steps, stages.sparsity, 0)
            axes.axhline(stages.target, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
        parts[0].set_ylabel("sparsity")
        _split(parts, stages)

    return paint


def _coefficient(stages: Stages) -> Any:
    def paint(parts: Any) -> None:
        for axes in parts:
            line(axes, stages.steps, stages.coef, 0)
            line(axes, stages.steps, stages.l1, 1)
        log_scale(parts[0].yaxis)
        parts[0].set_ylabel("log scale")
        _split(parts, stages)

    return paint


def _losses(stages: Stages) -> Any:
    def paint(parts: Any) -> None:
        for axes in parts:
            line(axes, stages.steps, stages.lm_loss, 0)
            line(axes, stages.steps, np.maximum(stages.term, 1e-12), 1)
        log_scale(parts[0].yaxis)
        parts[0].set_ylim(bottom=max(1e-6, float(stages.term[stages.term > 0].min())))
        parts[0].set_ylabel("nats per token, log scale")
        _split(parts, stages)

    return paint


def _split(parts: Any, stages: Stages) -> None:
    """The left axes show the first two stages and as much again, the right ones the rest of the run."""
    last = float(stages.steps[-1])
    turn = min(last, max(20.0, 1.8 * (stages.stage_2_end or last / 2)))
    near, far = parts
    near.set_xlim(0, turn)
    far.set_xlim(turn, max(last, turn + 1))
    near.set_xlabel("step")
    far.tick_params(axis="y", which="both", length=0)
    far.spines["left"].set_linestyle((0, (2, 3)))
    for axes in parts:
        compact_ticks(axes.xaxis)
        axes.locator_params(axis="x", nbins=3)
        _mark_stages(axes, stages)
    _name_stages(parts, stages)


def _mark_stages(axes: Any, stages: Stages) -> None:
    if stages.stage_1_end is not None:
        axes.axvspan(stages.stage_1_end, stages.stage_2_end or stages.steps[-1], color=BAND, linewidth=0, zorder=0)


def _name_stages(parts: Any, stages: Stages) -> None:
    near, far = parts
    first, second = stages.stage_1_end, stages.stage_2_end
    turn = near.get_xlim()[1]
    ends = [0.0, turn if first is None else float(first), turn if second is None else float(second), turn]
    for name, left, right in zip(("I", "II", "III"), ends, ends[1:], strict=False):
        if right - left > 0.04 * turn:
            near.text((left + right) / 2, 1.02, name, transform=near.get_xaxis_transform(), ha="center", color=MUTED)
    if second is not None and turn - second <= 0.04 * turn:
        far.text(0.5, 1.02, "III", transform=far.transAxes, ha="center", color=MUTED)


def _table(all_stages: Sequence[Stages]) -> Table:
    rows = [
        (stages.run, int(step), _stage_at(stages, step), *map(float, values))
        for stages in all_stages
        for step, *values in zip(
            stages.steps, stages.sparsity, stages.coef, stages.l1, stages.term, stages.lm_loss, strict=True
        )
    ]
    columns = ("run", "step", "stage", "sparsity", "coefficient", "l1", "coefficient_times_l1", "lm_loss")
    return Table(columns=columns, rows=tuple(rows))


def _stage_at(stages: Stages, step: float) -> str:
    if stages.stage_2_end is not None and step >= stages.stage_2_end:
        return "III"
    return "II" if stages.stage_1_end is not None and step >= stages.stage_1_end else "I"
