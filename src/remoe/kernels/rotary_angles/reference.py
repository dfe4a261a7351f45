"""The meaning of remoe::rotary_angles in plain PyTorch; also what runs on every device."""

import torch
from torch import Tensor


def rotary_angles(position_BS: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """See the op's docstring. fp32 whatever the model computes in: bf16 would merge neighbours from position 256 on."""
    pair = torch.arange(0, head_size, 2, device=position_BS.device, dtype=torch.float32)
    frequency = theta ** (-pair / head_size)
    angle = position_BS[:, None, :, None].float() * frequency
    return angle.cos(), angle.sin()
