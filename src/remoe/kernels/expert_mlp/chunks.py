"""Which of a call's rows are kept for the backward pass, and which are worked off at a time."""

from typing import NamedTuple


class Chunk(NamedTuple):
    """Rows first to first + size of the expert-sorted list; beyond the list's end there are none."""

    first: int
    size: int

    @property
    def is_kept(self) -> bool:
        """Whether the pre-activations are kept: those of the first chunk are."""
        return self.first == 0


def kept_rows(num_rows: int, row_cap: int) -> int:
    """Rows whose pre-activations are kept: all, or with more than `row_cap` (0: no cap) 3/4 of it.

    The last quarter, of all layers together, is left for what one layer's other chunks take while they are worked off.
    """
    return -(-3 * row_cap // 4) if num_rows > row_cap > 0 else num_rows


def chunks_of(num_rows: int, row_cap: int, hidden_size: int, expert_size: int) -> list[Chunk]:
    """The rows that are kept, and the others in as few equal pieces as may take memory.

    A row takes 3F + H numbers while it is worked off: pre-activations, which their gradient replaces, activations, and
    a row to gather from or to add up for its token. A piece may take as many as `row_cap` rows of 7F + H. That is a
    choice: with F = 4H and k = 1 of 8 one piece is all that is not kept of 4.4 rows a token. The dense start has four.
    """
    kept = kept_rows(num_rows, row_cap)
    if kept == num_rows:
        return [Chunk(0, kept)] if kept else []
    others = num_rows - kept
    most = row_cap * (7 * expert_size + hidden_size) // (3 * expert_size + hidden_size)
    size = -(-others // -(-others // most))
    return [Chunk(0, kept), *(Chunk(first, min(size, num_rows - first)) for first in range(kept, num_rows, size))]
