"""Which of a call's rows are kept for the backward pass, and which are worked off at a time."""

from typing import NamedTuple


class Chunk(NamedTuple):
    """Rows first to first + size of the expert-sorted list; beyond the list's end there are none."""

    first: int
    size: int


def kept_rows(num_rows: int, row_cap: int) -> int:
    """Rows whose pre-activations are kept: all, or with more than `row_cap` (0: no cap) 3/4 of it.

    The last quarter, of all layers together, is left for what one layer's other chunks take while they are worked off.
    """
    return -(-3 * row_cap // 4) if num_rows > row_cap > 0 else num_rows


def chunks_of(num_rows: int, row_cap: int) -> list[Chunk]:
    """The rows that are kept, and the others in equal pieces of no more than `row_cap`."""
    kept = kept_rows(num_rows, row_cap)
    if kept == num_rows:
        return [Chunk(0, kept)] if kept else []
    others = num_rows - kept
    size = -(-others // -(-others // row_cap))
    return [Chunk(0, kept), *(Chunk(first, min(size, num_rows - first)) for first in range(kept, num_rows, size))]
