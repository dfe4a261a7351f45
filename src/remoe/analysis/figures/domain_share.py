"""Which share of each domain's tokens every expert takes, in the first, middle and last MoE layer (ReMoE Fig. 9)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from remoe.analysis.drawing import INK, chart, series_colour, whole_ticks
from remoe.analysis.figure import Chart, Figure, Key
from remoe.analysis.record import COLOURS, RunRecord, routed
from remoe.analysis.table import Table

MAX_DOMAINS = COLOURS
MAX_BARS = 16


@dataclass(frozen=True, kw_only=True)
class DomainShare:
    """n_e / T within each domain, for one MoE layer of one run; `uniform` is k / E."""

    run: str
    layer: int
    domains: tuple[str, ...]
    share_DE: np.ndarray
    uniform: float


def numbers(runs: Sequence[RunRecord]) -> list[DomainShare]:
    """Layer by layer, the runs beside each other."""
    found = [(place, share) for _, run, counts in routed(runs) for place, share in enumerate(_shares(run.name, counts))]
    return [share for _, share in sorted(found, key=lambda item: item[0])]


def chosen_layers(num_layers: int) -> list[int]:
    """First, middle and last, without repeats."""
    return sorted({0, num_layers // 2, num_layers - 1})


def draw(shares: Sequence[DomainShare]) -> list[Chart]:
    """One chart a run and layer, all on the same axis."""
    top = max(float(share.share_DE.max()) for share in shares)
    return [
        Chart(
            f"{share.run}, layer {share.layer}",
            chart(_paint(share, top), label=f"domain share: {share.run} layer {share.layer}", height=230),
        )
        for share in shares
    ]


def figure(runs: Sequence[RunRecord]) -> Figure | None:
    """The figure, or None where no run routes."""
    shares = numbers(runs)
    if not shares:
        return None
    domains = list(dict.fromkeys(name for share in shares for name in share.domains))
    return Figure(
        key="domain-share",
        title="Who works for which domain",
        says=(
            "The share of each domain's tokens that every expert takes in the first, middle and last MoE layer; "
            "bars of unlike height mean that experts specialise."
        ),
        source="ReMoE, Figures 9 and 11",
        charts=tuple(draw(shares)),
        columns=min(3, len(routed(runs))),
        legend=(
            *(Key(name, f"c{index % COLOURS}", "box") for index, name in enumerate(domains[:MAX_DOMAINS])),
            Key("even load, k / E", "ink", "dash"),
        ),
        notes=_left_out(domains),
        table=_table(shares),
    )


def _shares(run: str, counts: Any) -> list[DomainShare]:
    seen_D = counts.tokens_D > 0
    share_LDE = counts.load_LDE[:, seen_D] / counts.tokens_D[seen_D][None, :, None]
    domains = tuple(name for name, seen in zip(counts.domains, seen_D, strict=True) if seen)
    uniform = counts.top_k / counts.num_experts
    return [
        DomainShare(run=run, layer=counts.layers[layer], domains=domains, share_DE=share_LDE[layer], uniform=uniform)
        for layer in chosen_layers(len(counts.layers))
    ]


def _paint(share: DomainShare, top: float) -> Any:
    shown = share.share_DE[:MAX_DOMAINS]
    num_experts = shown.shape[1]
    width = 0.84 / len(shown)

    def paint(axes: Any) -> None:
        for index, share_E in enumerate(shown):
            if num_experts <= MAX_BARS:
                left = np.arange(num_experts) - 0.42 + (index + 0.5) * width
                axes.bar(left, share_E, width=width * 0.92, color=series_colour(index), linewidth=0)
            else:
                axes.plot(share_E, ".", color=series_colour(index), markersize=5, alpha=0.8)
        axes.axhline(share.uniform, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
        axes.set_ylim(0, 1.05 * max(top, share.uniform))  # where no expert is active, top is 0
        axes.set_xlabel("expert")
        axes.set_ylabel("share of tokens")
        whole_ticks(axes.xaxis, num_experts)

    return paint


def _left_out(domains: Sequence[str]) -> tuple[str, ...]:
    more = len(domains) - MAX_DOMAINS
    return (f"The charts show {MAX_DOMAINS} domains; {more} more are in the numbers.",) if more > 0 else ()


def _table(shares: Sequence[DomainShare]) -> Table:
    rows = [
        (share.run, share.layer, share.domains[domain], expert, float(value))
        for share in shares
        for (domain, expert), value in np.ndenumerate(share.share_DE)
    ]
    return Table(columns=("run", "layer", "domain", "expert", "share_of_domain_tokens"), rows=tuple(rows))
