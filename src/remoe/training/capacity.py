"""How many rows each MoE layer allocates: chosen from the counts of earlier steps, so that a step need not wait."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from remoe.kernels.expert_mlp.chunks import kept_rows
from remoe.moe import MoE
from remoe.moe.experts import GroupedExperts
from remoe.moe.layer import Capacity, Exchange

WINDOW = 16
"""Steps that capacities are chosen from."""
SETTLED = 1.25
"""Counts have settled when the most of a window is at most this many times its least; until then steps run exactly."""
WASTE = 1.3
"""Rows in force that are this many times those needed are given up: a change compiles and captures the step anew."""
MOST_SHARES = 3
"""A layer keeps at most this many times an even share of the rows that all layers may keep: it bounds what its own
kernels hold at once. The first layer of trained ReLU models opens about 3k experts a token."""


class RowCapacity:
    """Rows for one micro-batch, layer by layer: the most of a window, its spread and 1/16 on top, rounded up.

    A count that never varies (Top-K in one process) is its capacity. `most` is the number of (token, expert) pairs of a
    micro-batch: a capacity of so many never overflows. Where ranks share experts a layer has two capacities, one after
    the other: `moe.layer.Capacity`.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.capacities: tuple[int, ...] | None = None
        """In force; None: exact rows, whose number the layers wait for."""
        self._counts: deque[Sequence[int]] = deque(maxlen=WINDOW)

    def see(self, needs_C: Sequence[int]) -> None:
        """Take what one step needed: in each layer, its largest micro-batch."""
        self._counts.append(needs_C)
        needed = self._needed()
        is_near = self.capacities is not None and self._is_near(self.capacities)
        if self.capacities is not None and not is_near and sum(self.capacities) <= WASTE * sum(needed):
            return
        if self._has_settled():
            self.capacities = needed
        elif is_near:
            self.capacities = None

    def _needed(self) -> tuple[int, ...]:
        return tuple(min(self.most, enough_for(counts)) for counts in zip(*self._counts, strict=True))

    def _is_near(self, capacities: Sequence[int]) -> bool:
        """Whether a layer's counts have come so near to its capacity that one of the next could be above it."""
        layers = zip(zip(*self._counts, strict=True), capacities, strict=True)
        return any(max(counts) + spread(counts) // 2 > capacity for counts, capacity in layers if capacity < self.most)

    def _has_settled(self) -> bool:
        totals = [sum(needs_C) for needs_C in self._counts]
        return len(totals) == WINDOW and max(totals) <= SETTLED * min(totals)


def enough_for(counts: Sequence[int]) -> int:
    """Rows that counts like these will hardly ever exceed."""
    most = max(counts)
    return rounded_up(most + spread(counts) + most // 16) if spread(counts) else most


def spread(counts: Sequence[int]) -> int:
    """How far counts lie apart; where they do at all, no less than 1/16 of the largest."""
    return max(max(counts) - min(counts), -(-max(counts) // 16)) if max(counts) > min(counts) else 0


def rounded_up(rows: int) -> int:
    """The next number with four significant bits (at most 1/8 more); a small number as it is."""
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


def layers_in_chunks(rows_L: Sequence[int], cap: int) -> list[bool]:
    """Which layers work in chunks (`kept_rows`), keep the first and compute the others again.

    A layer may keep more than `cap` rows where others keep fewer: all together no more than `cap` a layer, and none
    more than `MOST_SHARES` times that. Where they are too many, the smallest layer that is enough works in chunks, or
    the largest where none is: few rows are computed again.
    """
    in_chunks = [rows > MOST_SHARES * cap for rows in rows_L]
    while (excess := _kept(rows_L, in_chunks, cap) - cap * len(rows_L)) > 0:
        above = [layer for layer, rows in enumerate(rows_L) if rows > cap and not in_chunks[layer]]
        enough = [layer for layer in above if rows_L[layer] - kept_rows(rows_L[layer], cap) >= excess]
        chosen = min(enough, key=rows_L.__getitem__) if enough else max(above, key=rows_L.__getitem__)
        in_chunks[chosen] = True
    return in_chunks


def _kept(rows_L: Sequence[int], in_chunks: Sequence[bool], cap: int) -> int:
    return sum(kept_rows(rows, cap if chunked else 0) for rows, chunked in zip(rows_L, in_chunks, strict=True))


@contextmanager
def row_capacities(layers: Sequence[MoE], capacities: Sequence[int] | None, num_tokens: int) -> Iterator[bool]:
    """Let each layer allocate so many rows inside; None: as many as it needs, as before and after. Whether layers that
    ranks share follow: they do not where they would need more room than their budget.

    `num_tokens` of a micro-batch tell what the layers may keep together (`layers_in_chunks`). With exact rows each
    decides by itself.
    """
    try:
        yield capacities is not None and _set_capacities(layers, capacities, num_tokens)
    finally:
        for layer in layers:
            layer.row_capacity = None
            if layer.exchange is not None:
                layer.exchange.capacity = None
            if isinstance(layer.experts, GroupedExperts):
                layer.experts.keeps_all_rows = False


def _set_capacities(layers: Sequence[MoE], capacities: Sequence[int], num_tokens: int) -> bool:
    grouped = [layer.experts for layer in layers if isinstance(layer.experts, GroupedExperts)]
    exchanges = [layer.exchange for layer in layers if layer.exchange is not None]
    has_others = len(grouped) < len(layers)  # other experts do not follow capacities
    if exchanges:
        return not has_others and _set_exchanges(exchanges, capacities, num_tokens)
    for layer, capacity in zip(layers, capacities, strict=True):
        layer.row_capacity = capacity
    if has_others or not grouped:
        return True
    in_chunks = layers_in_chunks(capacities, grouped[0].row_cap(num_tokens))
    for experts, chunked in zip(grouped, in_chunks, strict=True):
        experts.keeps_all_rows = not chunked
    return True


def _set_exchanges(exchanges: Sequence[Exchange], capacities: Sequence[int], num_tokens: int) -> bool:
    """The same on all ranks, as their capacities are."""
    room = [Capacity(rows, pairs) for rows, pairs in zip(capacities[::2], capacities[1::2], strict=True)]
    if not all(exchange.has_room(one, num_tokens) for exchange, one in zip(exchanges, room, strict=True)):
        return False
    for exchange, one in zip(exchanges, room, strict=True):
        exchange.capacity = one
    return True
