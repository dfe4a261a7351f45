"""Rotary position embedding: query and key turn by an angle per position, so that scores see only distances."""

import torch
from torch import Tensor


def rotate(heads_BASD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of each head (the layout of transformers' LLaMA); keeps the dtype."""
    first, second = heads_BASD.chunk(2, dim=-1)
    turned_BASD = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned_BASD.to(heads_BASD.dtype)
