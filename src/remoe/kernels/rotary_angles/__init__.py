"""remoe::rotary_angles: cosines and sines of rotary positions, as an op so that a compiled model computes them once.

As plain code they would be computed anew for every element of every layer's heads.
"""

# pyright: reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
# (torch.library has no precise types)

import torch
from torch import Tensor

from remoe.kernels.rotary_angles import reference


@torch.library.custom_op("remoe::rotary_angles", mutates_args=())
def rotary_angles(position_BS: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles: fp32 [B, 1, S, D/2], to broadcast over heads; no gradient."""
    return reference.rotary_angles(position_BS, head_size, theta)


@rotary_angles.register_fake
def _(position_BS: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    batch_size, length = position_BS.shape
    cos = position_BS.new_empty((batch_size, 1, length, head_size // 2), dtype=torch.float32)
    return cos, torch.empty_like(cos)
