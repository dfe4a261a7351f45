"""Validation text in which the colour of each token shows how many experts it used."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from remoe.analysis.drawing import heat_step
from remoe.analysis.figure import Chart, Figure, Key
from remoe.analysis.html import Html, tag, visible
from remoe.analysis.record import Passage, RunRecord, routed, shown_as_text
from remoe.analysis.table import Table


@dataclass(frozen=True, kw_only=True)
class ColouredPassage:
    """A passage with the mean over layers of each token's active experts, and its place on the scale."""

    run: str
    passage: Passage
    mean_T: np.ndarray
    place_T: np.ndarray


def numbers(runs: Sequence[RunRecord]) -> list[ColouredPassage]:
    """Domain by domain, the runs beside each other; all on one colour scale."""
    _, high = limits(runs)
    found = [
        ColouredPassage(
            run=run.name,
            passage=passage,
            mean_T=passage.active_TL.mean(1),
            place_T=np.clip(passage.active_TL.mean(1) / high, 0, 1),
        )
        for _, run, _ in routed(shown_as_text(runs))
        for passage in run.passages
    ]
    order = list(dict.fromkeys(coloured.passage.domain for coloured in found))
    return sorted(found, key=lambda coloured: order.index(coloured.passage.domain))


def limits(runs: Sequence[RunRecord]) -> tuple[float, float]:
    """The colour scale's ends: 0 and the 98th percentile of all tokens' means (at least k)."""
    means = [passage.active_TL.mean(1) for _, run, _ in routed(runs) for passage in run.passages]
    nominal = max((counts.top_k for _, _, counts in routed(runs)), default=1)
    return 0.0, max(float(nominal), float(np.quantile(np.concatenate(means), 0.98)) if means else 0.0)


def draw(coloured: ColouredPassage) -> Html:
    """The passage, one span a token; hovering or reading aloud gives the number."""
    spans = [
        _span(text, float(mean), float(place), active_L)
        for text, mean, place, active_L in zip(
            coloured.passage.tokens, coloured.mean_T, coloured.place_T, coloured.passage.active_TL, strict=True
        )
    ]
    return tag("div", *spans, class_="passage")


def figure(runs: Sequence[RunRecord]) -> Figure | None:
    """The figure, or None where no run routes."""
    passages = numbers(runs)
    if not passages:
        return None
    low, high = limits(runs)
    return Figure(
        key="text-sample",
        title="How many experts each token used",
        says=(
            "Validation text; the stronger a token's colour, the more experts worked for it (mean over layers; hover "
            "for the number)."
        ),
        source="remoe; the idea of ReMoE, Figure 7, on running text",
        charts=tuple(Chart(f"{part.run}, {part.passage.domain}", draw(part)) for part in passages),
        columns=min(2, len({part.run for part in passages})),
        legend=tuple(_key(low + share * (high - low), share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)),
        table=_table(passages),
    )


def _key(value: float, share: float) -> Key:
    more = " or more" if share == 1 else ""
    return Key(f"{value:.2g}{more}", f"h{heat_step(share)}", "box")


def _span(text: str, mean: float, place: float, active_L: np.ndarray) -> Html:
    layers = " ".join(str(count) for count in active_L)
    shown = "".join("⏎\n" if character == "\n" else _shown(character) for character in text)
    return tag("span", shown, class_=f"t{heat_step(place)}", title=f"{mean:.2f} experts; by layer {layers}")


def _shown(character: str) -> str:
    return character if character == " " else visible(character)


def _table(passages: Sequence[ColouredPassage]) -> Table:
    rows = [
        (part.run, part.passage.domain, place, visible(text), float(mean))
        for part in passages
        for place, (text, mean) in enumerate(zip(part.passage.tokens, part.mean_T, strict=True))
    ]
    return Table(columns=("run", "domain", "position", "token", "active_experts"), rows=tuple(rows))
