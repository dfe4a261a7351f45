"""How many of a call's rows are worked off, and kept for the backward pass, at a time."""


def rows_at_once(num_rows: int, row_cap: int) -> int:
    """All of them, or with more than `row_cap` (0: no cap) the size of equal chunks of no more than 3/4 of it.

    The pre-activations of the first chunk are kept; the backward pass computes those of the others again. The rest of
    the cap is for what chunks need besides: sums in fp32.
    """
    num_chunks = -(-4 * num_rows // (3 * row_cap)) if num_rows > row_cap > 0 else 1
    return -(-num_rows // num_chunks)
