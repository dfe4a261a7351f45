"""The meaning of remoe::grouped_linear in plain PyTorch."""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped_linear(rows_NI: Tensor, weight: Tensor, bias: Tensor, expert_offsets: Tensor) -> Tensor:
    """Rows expert_offsets[e] to expert_offsets[e+1] through expert e's own W x + b."""
    bounds = cast(list[int], expert_offsets.tolist())  # pyright: ignore[reportUnknownMemberType]
    groups = [rows_NI[first:last] for first, last in pairwise(bounds)]
    return torch.cat([F.linear(*group) for group in zip(groups, weight, bias, strict=True)])
