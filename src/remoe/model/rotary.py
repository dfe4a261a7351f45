"""Rotary position embedding: query and key turn by an angle per position, so that scores see only distances."""

# pyright: reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
# (torch.library has no precise types)

import torch
from torch import Tensor


@torch.library.custom_op("remoe::rotary_angles", mutates_args=())
def rotary_angles(position_BS: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles: fp32 [B, 1, S, D/2], to broadcast over heads.

    fp32 whatever the model computes in: bf16 would merge neighbouring positions beyond 256. An op, so that a compiled
    model computes them once: as plain code they would be computed anew for every element of every layer's heads.
    """
    pair = torch.arange(0, head_size, 2, device=position_BS.device, dtype=torch.float32)
    frequency = theta ** (-pair / head_size)
    angle = position_BS[:, None, :, None].float() * frequency
    return angle.cos(), angle.sin()


@rotary_angles.register_fake
def _(position_BS: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    batch_size, length = position_BS.shape
    cos = position_BS.new_empty((batch_size, 1, length, head_size // 2), dtype=torch.float32)
    return cos, torch.empty_like(cos)


def rotate(heads_BASD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of each head (the layout of transformers' LLaMA); keeps the dtype."""
    first, second = heads_BASD.chunk(2, dim=-1)
    turned_BASD = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned_BASD.to(heads_BASD.dtype)
