"""The meaning of the row ops: copy a token to its rows; sum a token's rows."""

import torch
from torch import Tensor


def dispatch_rows(hidden_TH: Tensor, token_N: Tensor) -> Tensor:
    """rows[n] = hidden[token_N[n]]."""
    return hidden_TH.index_select(0, token_N)


def combine_rows(rows_NH: Tensor, token_N: Tensor, num_tokens: int) -> Tensor:
    """out[t] = sum of the rows whose token is t; 0 for a token without rows."""
    return torch.zeros(num_tokens, rows_NH.shape[1], dtype=rows_NH.dtype).index_add(0, token_N, rows_NH)
