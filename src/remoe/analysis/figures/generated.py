"""Text that the models write when they go on from the start of a validation document."""

from collections.abc import Sequence
from dataclasses import dataclass

from remoe.analysis.figure import Chart, Figure
from remoe.analysis.html import Html, tag
from remoe.analysis.record import Generation, RunRecord, shown_as_text
from remoe.analysis.table import Table


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run's continuation of one prompt."""

    run: str
    generation: Generation


def numbers(runs: Sequence[RunRecord]) -> list[Sample]:
    """Domain by domain, the runs beside each other."""
    found = [
        Sample(run=run.name, generation=generation) for run in shown_as_text(runs) for generation in run.generations
    ]
    order = list(dict.fromkeys(sample.generation.domain for sample in found))
    return sorted(found, key=lambda sample: order.index(sample.generation.domain))


def draw(generation: Generation) -> Html:
    """The prompt in a quiet colour, then the continuation."""
    prompt = tag("span", generation.prompt, class_="prompt")
    return tag("div", prompt, generation.continuation, class_="passage generated")


def figure(runs: Sequence[RunRecord]) -> Figure | None:
    """The figure, or None where nothing was generated."""
    samples = numbers(runs)
    if not samples:
        return None
    return Figure(
        key="generated",
        title="Generated text",
        says="What each model writes after the start of a validation document (the start is grey).",
        source="remoe",
        charts=tuple(Chart(f"{s.run}, {s.generation.domain}", draw(s.generation)) for s in samples),
        columns=min(3, len(shown_as_text(runs))),
        table=_table(samples),
    )


def _table(samples: Sequence[Sample]) -> Table:
    rows = [(s.run, s.generation.domain, s.generation.prompt, s.generation.continuation) for s in samples]
    return Table(columns=("run", "domain", "prompt", "continuation"), rows=tuple(rows))
