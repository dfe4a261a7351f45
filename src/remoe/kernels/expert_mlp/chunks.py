"""How many of a call's rows are worked off, and kept for the backward pass, at a time."""


def rows_at_once(num_rows: int, row_cap: int) -> int:
    """All of them, or the size of equal chunks of no more than `row_cap` rows (0: no cap).

    The pre-activations of the first chunk are kept; the backward pass computes those of the others again.
    """
    num_chunks = -(-num_rows // row_cap) if row_cap else 1
    return -(-num_rows // max(1, num_chunks))
