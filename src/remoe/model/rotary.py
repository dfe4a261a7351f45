"""Rotary position embedding: query and key turn by an angle per position, so that scores see only distances."""

import torch
from torch import Tensor


def rotary_angles(position_BS: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles: fp32 [B, 1, S, D/2], to broadcast over heads.

    fp32 whatever the model computes in: bf16 would merge neighbouring positions beyond 256.
    """
    pair = torch.arange(0, head_size, 2, device=position_BS.device, dtype=torch.float32)
    frequency = theta ** (-pair / head_size)
    angle = position_BS[:, None, :, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(heads_BASD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of each head (the layout of transformers' LLaMA); keeps the dtype."""
    first, second = heads_BASD.chunk(2, dim=-1)
    turned_BASD = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned_BASD.to(heads_BASD.dtype)
