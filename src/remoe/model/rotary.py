"""Rotary position embedding: query and key turn by an angle per position, so that scores see only distances."""

import torch
from torch import Tensor


def rotate(heads_BASD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of each head (the layout of transformers' LLaMA); keeps the dtype.

    In memory a token's heads lie side by side, as projections leave them: attention then does so too, and nothing has
    to be copied on the way to the output projection or back.
    """
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    first, second = heads_BASD.transpose(1, 2).chunk(2, dim=-1)
    turned_BSAD = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned_BSAD.to(heads_BASD.dtype).transpose(1, 2)
