"""Which tokens each expert takes most (ReMoE Table 12)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from remoe.analysis.collect import TextCounts
from remoe.analysis.figure import Chart, Figure
from remoe.analysis.html import Html, tag, visible
from remoe.analysis.record import RunRecord, routed, shown_as_text
from remoe.analysis.table import Table

MIN_OCCURRENCES = 20
MIN_SHARE = 0.01
LISTED = 8
MAX_EXPERTS = 16


@dataclass(frozen=True, kw_only=True)
class TokenShare:
    """count(M[t, e] for the id) / count(id): the share of a token's occurrences that an expert works for."""

    run: str
    layer: int
    expert: int
    text: str
    share: float
    occurrences: int


def numbers(runs: Sequence[RunRecord]) -> list[TokenShare]:
    """For each run, layer with token counts, and expert: the ids with the largest shares, largest first."""
    return [
        share
        for _, run, counts in routed(shown_as_text(runs))
        for place in range(len(counts.token_layers))
        for expert in range(counts.num_experts)
        for share in favourites(run, counts, place, expert)
    ]


def favourites(run: RunRecord, counts: TextCounts, place: int, expert: int) -> list[TokenShare]:
    """The ids that an expert takes most, of those that occur often enough; frequent ones first among equals."""
    often_U = np.flatnonzero(counts.occurrences_U >= MIN_OCCURRENCES)
    share_U = counts.token_load_NEU[place, expert, often_U] / counts.occurrences_U[often_U]
    order = np.lexsort((-counts.occurrences_U[often_U], -share_U))[:LISTED]
    return [
        TokenShare(
            run=run.name,
            layer=counts.layers[counts.token_layers[place]],
            expert=expert,
            text=run.token_texts[often_U[index]],
            share=float(share_U[index]),
            occurrences=int(counts.occurrences_U[often_U[index]]),
        )
        for index in order
        if share_U[index] >= MIN_SHARE
    ]


def draw(shares: Sequence[TokenShare], num_experts: int) -> Html:
    """A list of tokens for each expert of one run and layer, the first 16 of them."""
    experts = range(min(num_experts, MAX_EXPERTS))
    cards = [_card(expert, [share for share in shares if share.expert == expert]) for expert in experts]
    return tag("div", *cards, class_="experts")


def figure(runs: Sequence[RunRecord]) -> Figure | None:
    """The figure for the middle MoE layer, or None where no token occurs often enough."""
    shares = numbers(runs)
    if not shares:
        return None
    charts = [_chart(run, counts, shares) for _, run, counts in routed(shown_as_text(runs))]
    return Figure(
        key="expert-tokens",
        title="What each expert likes",
        says=(
            f"The tokens that each expert of the middle layer takes most, with the share of their occurrences that it "
            f"works for; only tokens that occur at least {MIN_OCCURRENCES} times count."
        ),
        source="ReMoE, Table 12",
        charts=tuple(charts),
        columns=min(2, len(charts)),
        table=_table(shares),
    )


def _chart(run: RunRecord, counts: TextCounts, shares: Sequence[TokenShare]) -> Chart:
    layer = counts.layers[len(counts.layers) // 2]
    here = [share for share in shares if (share.run, share.layer) == (run.name, layer)]
    return Chart(f"{run.name}, layer {layer}", draw(here, counts.num_experts))


def _card(expert: int, shares: Sequence[TokenShare]) -> Html:
    items = [
        tag(
            "li",
            tag("code", visible(share.text)),
            tag("span", f"{share.share:.0%}"),
            title=f"{share.occurrences:,} occurrences",
        )
        for share in shares
    ]
    tokens = tag("ol", *items, class_="tokens") if items else tag("p", "takes no token often", class_="note")
    return tag("div", tag("h4", f"Expert {expert}"), tokens)


def _table(shares: Sequence[TokenShare]) -> Table:
    rows = [(s.run, s.layer, s.expert, visible(s.text), s.share, s.occurrences) for s in shares]
    return Table(columns=("run", "layer", "expert", "token", "share_of_occurrences", "occurrences"), rows=tuple(rows))
