"""How many experts a token of each domain uses, layer by layer (ReMoE Fig. 12)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from remoe.analysis.drawing import INK, MUTED, POINTS, chart, series_colour
from remoe.analysis.figure import Chart, Figure, Key
from remoe.analysis.record import COLOURS, RunRecord, routed
from remoe.analysis.table import Table

MAX_DOMAINS = COLOURS


@dataclass(frozen=True, kw_only=True)
class DomainActivity:
    """Mean active experts of one run by MoE layer and domain, and over all domains."""

    run: str
    layers: tuple[int, ...]
    domains: tuple[str, ...]
    top_k: int
    active_LD: np.ndarray
    all_L: np.ndarray
    no_expert_L: np.ndarray
    """Share of tokens that no expert works for."""


def numbers(runs: Sequence[RunRecord]) -> list[DomainActivity]:
    """One for each run that routes."""
    return [_activity(run.name, counts) for _, run, counts in routed(runs)]


def draw(activities: Sequence[DomainActivity]) -> list[Chart]:
    """One chart a run, all on the same axis."""
    top = max(float(activity.active_LD.max()) for activity in activities)
    return [
        Chart(activity.run, chart(_paint(activity, top), label=f"domain activity: {activity.run}"))
        for activity in activities
    ]


def figure(runs: Sequence[RunRecord]) -> Figure | None:
    """The figure, or None where no run routes."""
    activities = numbers(runs)
    if not activities:
        return None
    domains = list(dict.fromkeys(name for activity in activities for name in activity.domains))
    return Figure(
        key="domain-activity",
        title="Experts per token, by layer and domain",
        says="How many experts a token uses on average in each layer; Top-K gives every token the same number.",
        source="ReMoE, Figure 12",
        charts=tuple(draw(activities)),
        columns=min(3, max(2, len(activities))),
        legend=(
            *(Key(name, f"c{index % COLOURS}") for index, name in enumerate(domains[:MAX_DOMAINS])),
            Key("all domains", "ink"),
            Key("nominal k", "muted", "dash"),
        ),
        notes=tuple(_summary(activity) for activity in activities),
        table=_table(activities),
    )


def _activity(run: str, counts: Any) -> DomainActivity:
    seen_D = counts.tokens_D > 0
    pairs_LD = counts.load_LDE.sum(2)
    return DomainActivity(
        run=run,
        layers=counts.layers,
        domains=tuple(name for name, seen in zip(counts.domains, seen_D, strict=True) if seen),
        top_k=counts.top_k,
        active_LD=pairs_LD[:, seen_D] / counts.tokens_D[seen_D],
        all_L=pairs_LD.sum(1) / counts.num_tokens,
        no_expert_L=counts.tokens_by_active_LA[:, 0] / counts.num_tokens,
    )


def _summary(activity: DomainActivity) -> str:
    mean, idle = float(activity.all_L.mean()), float(activity.no_expert_L.mean())
    return f"{activity.run}: {mean:.3f} experts a token on average; {idle:.1%} of them use none (layers averaged)."


def _paint(activity: DomainActivity, top: float) -> Any:
    places = np.arange(len(activity.layers))

    def paint(axes: Any) -> None:
        axes.axhline(activity.top_k, color=MUTED, linewidth=1.1, linestyle=(0, (4, 2)))
        for index, values in enumerate(activity.active_LD.T[:MAX_DOMAINS]):
            point = POINTS[index % len(POINTS)]
            axes.plot(places, values, color=series_colour(index), marker=point, markersize=4.5, linewidth=1.2)
        axes.plot(places, activity.all_L, color=INK, linewidth=2.4)
        axes.set_ylim(0, 1.08 * max(top, activity.top_k))
        axes.set_xlabel("layer")
        axes.set_ylabel("active experts per token")
        every = max(1, -(-len(places) // 16))
        axes.set_xticks(places[::every], [str(layer) for layer in activity.layers[::every]])

    return paint


def _table(activities: Sequence[DomainActivity]) -> Table:
    rows: list[tuple[Any, ...]] = []
    for activity in activities:
        for place, layer in enumerate(activity.layers):
            rows += [
                (activity.run, layer, name, float(value))
                for name, value in zip(activity.domains, activity.active_LD[place], strict=True)
            ]
            rows.append((activity.run, layer, "all domains", float(activity.all_L[place])))
            rows.append((activity.run, layer, "share of tokens without an expert", float(activity.no_expert_L[place])))
    return Table(columns=("run", "layer", "domain", "active_experts_per_token"), rows=tuple(rows))
