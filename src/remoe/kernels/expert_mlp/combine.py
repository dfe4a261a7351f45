"""Gather-sum of expert rows per token: no atomics, rows in expert order, so the same bits each run."""

import torch
from torch import Tensor
from torch.nn import functional as F


def gather_sum(rows_NH: Tensor, row_N: Tensor, token_offsets: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """out[t] = sum of (weight *) rows of token t, summed in fp32 or wider [T, H]; 0 for a token without rows.

    An embedding bag is exactly this: token t's bag lists its rows; weights_N is in the order of rows_NH. The result
    has the rows' dtype, or with weights the wider of the two. Entries of row_N after the last bag count for nothing.
    """
    dtype = rows_NH.dtype if weights_N is None else torch.promote_types(rows_NH.dtype, weights_N.dtype)
    if row_N.numel() == 0:
        return rows_NH.new_zeros((token_offsets.shape[0] - 1, rows_NH.shape[1]), dtype=dtype)
    bag_weights_N = None if weights_N is None else weights_N.to(dtype).index_select(0, row_N)
    offsets = F.pad(token_offsets, (0, 1), value=row_N.numel())  # a bag for what is left over: CUDA adds it to the last
    out_TH, *_ = torch.embedding_bag(
        rows_NH.to(dtype), row_N, offsets, mode=0, per_sample_weights=bag_weights_N, include_last_offset=True
    )
    return out_TH[:-1]
