"""Loss against active experts: what the density dial does to a trained model (`remoe density`)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from remoe.analysis.drawing import INK, chart, series_colour
from remoe.analysis.figure import Chart, Figure, Key, run_key
from remoe.analysis.record import RunRecord, places
from remoe.analysis.table import Table
from remoe.eval.density import ONE_NUMBER, PER_LAYER, DensityCurve


class RunDensity(NamedTuple):
    """The curve of one run, and how charts draw it."""

    run: str
    place: int
    curve: DensityCurve


def numbers(runs: Sequence[RunRecord]) -> list[RunDensity]:
    """The runs for which `remoe density` measured a curve."""
    placed = zip(places(runs), runs, strict=True)
    return [RunDensity(run.name, place, run.density) for place, run in placed if run.density is not None]


def draw(runs: Sequence[RunDensity]) -> Chart:
    """One chart with all curves."""
    return Chart("Loss by active experts a token", chart(_paint(runs), label="density dial"))


def figure(runs: Sequence[RunRecord]) -> Figure | None:
    """The figure, or None where no curve was measured."""
    measured = numbers(runs)
    return figure_of(measured) if measured else None


def figure_of(measured: Sequence[RunDensity]) -> Figure:
    """The figure of some curves."""
    return Figure(
        key="density",
        title="The density dial",
        says=(
            "Loss when the trained model uses fewer or more experts, by a threshold on its ReLU gates: one for each "
            "layer, or one number for all."
        ),
        source="remoe density",
        charts=(draw(measured),),
        columns=1,
        legend=(
            *(run_key(run.run, run.place) for run in measured),
            Key("a threshold for each layer", "ink"),
            Key("one number for all layers", "ink", "dash"),
            Key("as trained", "ink", "dot"),
        ),
        notes=tuple(_note(run) for run in measured),
        table=_table(measured),
    )


def _note(run: RunDensity) -> str:
    curve = run.curve
    return (
        f"{run.run}: thresholds chosen on {curve.calibration_tokens:,} tokens of text, losses measured on "
        f"{curve.tokens:,} others."
    )


def _paint(runs: Sequence[RunDensity]) -> Any:
    def paint(axes: Any) -> None:
        for run in runs:
            colour = series_colour(run.place)
            for kind, style in ((PER_LAYER, "-"), (ONE_NUMBER, (0, (4, 2)))):
                points = run.curve.of_kind(kind)
                active, loss = [point.active_experts for point in points], [point.loss for point in points]
                axes.plot(active, loss, color=colour, linestyle=style, linewidth=1.6, marker="o", markersize=2.5)
            trained = run.curve.trained
            axes.plot([trained.active_experts], [trained.loss], "o", color=INK, markersize=6, zorder=3)
        axes.set_xlim(left=0)
        axes.set_xlabel("active experts a token and MoE layer")
        axes.set_ylabel("loss, nats a token")

    return paint


def _table(runs: Sequence[RunDensity]) -> Table:
    rows = [
        (run.run, point.kind, point.target, point.active_experts, point.loss, " ".join(map(str, point.thresholds)))
        for run in runs
        for point in run.curve.points
    ]
    return Table(columns=("run", "thresholds_are", "target", "active_experts", "loss", "thresholds"), rows=tuple(rows))
