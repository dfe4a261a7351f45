"""Counts of what the routers of one rank did in a step, taken once for each backward pass."""

from copy import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from remoe.moe import stats
from remoe.moe.routing import Routing, count_tokens


class StepCounts:
    """int64 [L, E + 1] over all layers of the model: tokens at each expert, then tokens; 0 for layers without experts.

    Ranks of different pipeline stages, and model chunks of one rank, fill different rows.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self.rows_LE1 = torch.zeros(num_layers, num_experts + 1, dtype=torch.int64, device=device)

    def take(self) -> "StepCounts":
        """The counts so far; the next step starts at 0."""
        taken = copy(self)
        taken.rows_LE1 = self.rows_LE1.clone()
        self.rows_LE1.zero_()
        return taken

    def sum_over(self, groups: list[dist.ProcessGroup]) -> None:
        """Add the counts of the other ranks of each group in turn."""
        for group in groups:
            self.rows_LE1 = summed(self.rows_LE1, group)

    @property
    def active_L(self) -> Tensor:
        """Active (token, expert) pairs of each layer."""
        return self.rows_LE1[:, :-1].sum(1)

    @property
    def total_L(self) -> Tensor:
        """Pairs that could be active: tokens times experts."""
        return self.rows_LE1[:, -1] * (self.rows_LE1.shape[1] - 1)


def counts_of(routing: Routing) -> Tensor:
    """Tokens at each expert, then tokens that count: int64 [E + 1]."""
    return torch.cat((stats.tokens_per_expert(routing), count_tokens(routing)[None]))


def summed(counts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the ranks of a group; None: of one process."""
    if group is None or group.size() == 1:
        return counts
    counts = counts.clone()
    dist.all_reduce(counts, group=group)
    return counts


def counted_in_backward(weights_TE: Tensor, counts_E1: Tensor, row_E1: Tensor) -> Tensor:
    """The same weights; their backward pass adds the counts to a row of StepCounts.

    A forward pass may run twice (recomputation) or for nothing (evaluation), a backward pass runs once a micro-batch.
    """
    return _Counted.apply(weights_TE, counts_E1, row_E1)  # pyright: ignore[reportReturnType]


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_TE: Tensor, counts_E1: Tensor, row_E1: Tensor) -> Tensor:
        ctx.counts_E1, ctx.row_E1 = counts_E1, row_E1
        return weights_TE.view_as(weights_TE)

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        ctx.row_E1.add_(ctx.counts_E1)
        return grad_TE, None, None
