"""Integer counts of what the routers did in one step, layer by layer; exact for any split into micro-batches."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from remoe.moe import stats
from remoe.moe.routing import Routing, count_tokens


class RoutingCounts(NamedTuple):
    """Counts over the MoE layers, int64; masked tokens never count. Counts of parts of a batch add up."""

    tokens_per_expert_LE: Tensor
    tokens_L: Tensor
    without_expert_L: Tensor

    @property
    def active_L(self) -> Tensor:
        """Active (token, expert) pairs."""
        return self.tokens_per_expert_LE.sum(1)

    @property
    def total_L(self) -> Tensor:
        """Pairs that could be active: tokens times experts."""
        return self.tokens_L * self.tokens_per_expert_LE.shape[1]

    @property
    def loads_LE(self) -> Tensor:
        """Share of tokens at each expert, n_e/T, fp32."""
        return self.tokens_per_expert_LE.to(torch.float32) / self.tokens_L.clamp(min=1)[:, None].to(torch.float32)

    def of_layers(self, layers: slice) -> "RoutingCounts":
        """Counts of some of the layers."""
        return RoutingCounts(*(values[layers] for values in self))

    def plus(self, other: "RoutingCounts") -> "RoutingCounts":
        """Counts of both parts."""
        return RoutingCounts(*(a + b for a, b in zip(self, other, strict=True)))


@torch.no_grad()
def count(routings: Sequence[Routing]) -> RoutingCounts | None:
    """Counts of one forward pass; None for a model without MoE layers."""
    if not routings:
        return None
    return RoutingCounts(
        torch.stack([stats.tokens_per_expert(routing) for routing in routings]),
        torch.stack([count_tokens(routing) for routing in routings]),
        torch.stack([stats.tokens_without_expert(routing) for routing in routings]),
    )
