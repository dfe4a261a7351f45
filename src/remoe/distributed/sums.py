"""Sums over ranks of several device values at once, and the largest of each."""

from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Key = TypeVar("Key")


def total_over(values: Mapping[Key, Tensor], group: dist.ProcessGroup | None) -> dict[Key, Tensor]:
    """The sums over the ranks of a group (None: all), each in its own dtype: one all-reduce a dtype."""
    summed: dict[Key, Tensor] = {}
    for dtype in sorted({value.dtype for value in values.values()}, key=str):
        summed |= _total({name: value for name, value in values.items() if value.dtype == dtype}, group)
    return {name: summed[name] for name in values}


def largest_over(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The largest of each value over the ranks of a group (None: all)."""
    largest = values.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest


def _total(values: Mapping[Key, Tensor], group: dist.ProcessGroup | None) -> dict[Key, Tensor]:
    flat = torch.cat([value.detach().reshape(-1) for value in values.values()])
    dist.all_reduce(flat, group=group)
    parts = flat.split([value.numel() for value in values.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(values.items(), parts, strict=True)}
