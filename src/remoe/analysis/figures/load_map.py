"""The share of all tokens at each expert of each layer, as a heat map (ReMoE Fig. 8b, 8c)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from remoe.analysis.drawing import INK, PAPER, chart, heat_colour, heat_step, heat_text_colour, whole_ticks
from remoe.analysis.figure import Chart, Figure, Key
from remoe.analysis.record import RunRecord, routed
from remoe.analysis.table import Table

PAPER_LOWEST_LOG2 = -6
"""The paper's scale ends at 1/64, an eighth of an even load on 8 experts; idle experts lie below."""

LABELLED_CELLS = 16


@dataclass(frozen=True, kw_only=True)
class LoadMap:
    """n_e / T of one run by MoE layer and expert; `uniform` is k / E."""

    run: str
    layers: tuple[int, ...]
    load_LE: np.ndarray
    uniform: float
    lowest_log2: int
    """The end of the colour scale, the same for all runs of a report."""

    @property
    def idle(self) -> int:
        """Experts below the colour scale."""
        return int((self.load_LE < 2.0**self.lowest_log2).sum())


def numbers(runs: Sequence[RunRecord]) -> list[LoadMap]:
    """One map for each run that routes."""
    lowest = scale_end([counts.top_k / counts.num_experts for _, _, counts in routed(runs)])
    return [
        LoadMap(
            run=run.name,
            layers=counts.layers,
            load_LE=counts.load_LE,
            uniform=counts.top_k / counts.num_experts,
            lowest_log2=lowest,
        )
        for _, run, counts in routed(runs)
    ]


def scale_end(uniform: Sequence[float]) -> int:
    """log2 of the lowest load with a colour: the paper's 1/64, or an eighth of an even load where that is less."""
    return min([PAPER_LOWEST_LOG2, *(math.floor(math.log2(load / 8)) for load in uniform)])


def brightness(load: float, lowest_log2: int = PAPER_LOWEST_LOG2) -> float | None:
    """Place on the colour scale, 0 at its lower end and 1 at 1, linear in log2; None below it."""
    return None if load < 2.0**lowest_log2 else 1 - float(np.log2(load)) / lowest_log2


def draw(maps: Sequence[LoadMap]) -> list[Chart]:
    """One heat map a run, all on the same scale."""
    return [Chart(load.run, _heat_map(load)) for load in maps]


def figure(runs: Sequence[RunRecord]) -> Figure | None:
    """The figure, or None where no run routes."""
    maps = numbers(runs)
    if not maps:
        return None
    lowest = maps[0].lowest_log2
    idle = "; ".join(f"{load.run} {load.idle} of {load.load_LE.size}" for load in maps)
    return Figure(
        key="load-map",
        title="Load of each expert",
        says=(
            f"The share of validation tokens that each expert works for; a perfectly even load would be "
            f"{maps[0].uniform:.3g} everywhere. The colour is on a log scale from 1/{2**-lowest} to 1."
        ),
        source="ReMoE, Figure 8b and c",
        charts=tuple(draw(maps)),
        columns=min(3, len(maps)),
        legend=(
            *(_key(log2, lowest) for log2 in range(lowest, 1)),
            Key(f"below 1/{2**-lowest}: idle", "muted", "hatch"),
        ),
        notes=(f"Idle experts: {idle}.",),
        table=_table(maps),
    )


def _key(log2: int, lowest_log2: int) -> Key:
    step = heat_step(1 - log2 / lowest_log2)
    return Key("1" if log2 == 0 else f"1/{2**-log2}", f"h{step}", "box")


def _heat_map(load: LoadMap) -> Any:
    num_layers, num_experts = load.load_LE.shape
    height = min(620, 70 + max(6, num_layers) * 26)

    def paint(axes: Any) -> None:
        axes.grid(False)
        for layer, expert in np.ndindex(num_layers, num_experts):
            _cell(axes, layer, expert, brightness(float(load.load_LE[layer, expert]), load.lowest_log2))
        if num_experts <= LABELLED_CELLS:
            _write_shares(axes, load)
        axes.set_xlim(-0.5, num_experts - 0.5)
        axes.set_ylim(num_layers - 0.5, -0.5)
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        whole_ticks(axes.xaxis, num_experts)
        axes.set_yticks(range(num_layers), [str(layer) for layer in load.layers])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    return chart(paint, label=f"load map: {load.run}", height=height)


def _cell(axes: Any, layer: int, expert: int, place: float | None) -> None:
    from matplotlib.patches import Rectangle

    look: dict[str, Any] = (
        {"facecolor": "none", "hatch": "////"} if place is None else {"facecolor": heat_colour(place)}
    )
    axes.add_patch(Rectangle((expert - 0.5, layer - 0.5), 1, 1, edgecolor=PAPER, linewidth=1.2, **look))


def _write_shares(axes: Any, load: LoadMap) -> None:
    for (layer, expert), share in np.ndenumerate(load.load_LE):
        place = brightness(float(share), load.lowest_log2)
        colour = INK if place is None else heat_text_colour(place)
        text = f"{share:.2f}".lstrip("0") if share < 0.995 else "1"
        axes.text(expert, layer, text, ha="center", va="center", fontsize=10, color=colour)


def _table(maps: Sequence[LoadMap]) -> Table:
    rows = [
        (load.run, load.layers[layer], expert, float(share))
        for load in maps
        for (layer, expert), share in np.ndenumerate(load.load_LE)
    ]
    return Table(columns=("run", "layer", "expert", "share_of_tokens"), rows=tuple(rows))
