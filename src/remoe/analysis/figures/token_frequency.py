"""How many experts a vocabulary entry uses, against how often it occurs (ReMoE Fig. 7)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from remoe.analysis.drawing import INK, chart, compact_ticks, log_scale, series_colour
from remoe.analysis.figure import Chart, Figure, Key, run_key
from remoe.analysis.html import Html, tag, visible
from remoe.analysis.record import RunRecord, routed
from remoe.analysis.table import Table

MIN_OCCURRENCES = 5
LISTED = 8
MAX_POINTS = 400


@dataclass(frozen=True, kw_only=True)
class TokenActivity:
    """Mean active experts (over layers and occurrences) and share of all tokens by vocabulary entry, fewest first."""

    run: str
    place: int
    top_k: int
    texts: tuple[str, ...]
    occurrences_U: np.ndarray
    active_U: np.ndarray
    frequency_U: np.ndarray
    rank_correlation: float
    """Spearman's, of frequency and active experts: below 0 where rare tokens get more experts."""


def numbers(runs: Sequence[RunRecord]) -> list[TokenActivity]:
    """One for each run that routes, of the entries that occur at least 5 times."""
    return [_activity(place, run, counts) for place, run, counts in routed(runs)]


def draw(activity: TokenActivity) -> list[Chart]:
    """The sorted curve above, the frequencies of the same entries below; and the two ends as lists."""
    grid = {"nrows": 2, "sharex": True, "gridspec_kw": {"height_ratios": [1, 1]}}
    body = chart(_paint(activity), label=f"token frequency: {activity.run}", height=330, **grid)
    return [Chart(f"{activity.run}: vocabulary entries, fewest experts first", Html(body + _ends(activity)))]


def figure(runs: Sequence[RunRecord]) -> Figure | None:
    """The figure, or None where no run routes or the text is too short to count."""
    activities = [activity for activity in numbers(runs) if len(activity.active_U) > 1]
    if not activities:
        return None
    return Figure(
        key="token-frequency",
        title="Rare and frequent tokens",
        says=(
            "Vocabulary entries sorted by how many experts they use on average (above), and how often each occurs "
            "(below); in the paper rare ones get the most experts."
        ),
        source="ReMoE, Figure 7",
        charts=tuple(part for activity in activities for part in draw(activity)),
        columns=min(3, max(2, len(activities))),
        legend=(
            *(run_key(activity.run, activity.place, "dot") for activity in activities),
            Key("nominal k", "ink", "dash"),
        ),
        notes=tuple(_note(activity) for activity in activities),
        table=_table(activities),
    )


def rank_correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; 0 where one side does not vary."""
    left, right = _ranks(left), _ranks(right)
    if left.std() == 0 or right.std() == 0:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _activity(place: int, run: RunRecord, counts: Any) -> TokenActivity:
    active_U = counts.active_U / np.maximum(1, counts.occurrences_U) / len(counts.layers)
    often = np.flatnonzero(counts.occurrences_U >= MIN_OCCURRENCES)
    order = often[np.lexsort((-counts.occurrences_U[often], active_U[often]))]
    return TokenActivity(
        run=run.name,
        place=place,
        top_k=counts.top_k,
        texts=tuple(run.token_texts[index] for index in order),
        occurrences_U=counts.occurrences_U[order],
        active_U=active_U[order],
        frequency_U=counts.occurrences_U[order] / counts.num_tokens,
        rank_correlation=rank_correlation(active_U[order], counts.occurrences_U[order]),
    )


def _note(activity: TokenActivity) -> str:
    return (
        f"{activity.run}: rank correlation of frequency and experts used {activity.rank_correlation:+.2f}, over "
        f"{len(activity.active_U):,} entries that occur at least {MIN_OCCURRENCES} times."
    )


def _paint(activity: TokenActivity) -> Any:
    places = np.arange(len(activity.active_U))
    shown = np.unique(np.linspace(0, len(places) - 1, min(len(places), MAX_POINTS)).astype(int))
    colour = series_colour(activity.place)

    def paint(parts: Any) -> None:
        experts, frequency = parts
        experts.axhline(activity.top_k, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
        experts.plot(places[shown], activity.active_U[shown], color=colour, linewidth=2.2)
        experts.set_ylim(0, 1.08 * max(float(activity.active_U.max()), activity.top_k))
        experts.set_ylabel("active experts")
        frequency.plot(places[shown], activity.frequency_U[shown], "o", color=colour, markersize=2.8, alpha=0.7)
        log_scale(frequency.yaxis)
        frequency.set_ylabel("frequency")
        frequency.set_xlabel("vocabulary entry")
        compact_ticks(frequency.xaxis)

    return paint


def _ends(activity: TokenActivity) -> Html:
    """The entries with the most and the fewest experts, as two short lists."""
    if activity.active_U[0] == activity.active_U[-1]:
        return tag("p", "Every entry uses the same number of experts.", class_="note")
    count = min(LISTED, len(activity.texts) // 2)
    most = range(len(activity.texts) - 1, len(activity.texts) - 1 - count, -1)
    return tag("div", _list("Most experts", activity, most), _list("Fewest", activity, range(count)), class_="pair")


def _list(title: str, activity: TokenActivity, places: Sequence[int]) -> Html:
    items = [
        tag("li", tag("code", visible(activity.texts[place])), tag("span", f"{activity.active_U[place]:.2f}"))
        for place in places
    ]
    return tag("div", tag("h4", title), tag("ol", *items, class_="tokens"))


def _table(activities: Sequence[TokenActivity]) -> Table:
    rows = [
        (activity.run, visible(text), int(count), float(frequency), float(active))
        for activity in activities
        for text, count, frequency, active in zip(
            activity.texts, activity.occurrences_U, activity.frequency_U, activity.active_U, strict=True
        )
    ]
    return Table(columns=("run", "token", "occurrences", "frequency", "active_experts"), rows=tuple(rows))
