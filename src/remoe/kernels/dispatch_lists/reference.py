"""The meaning of remoe::dispatch_lists in plain PyTorch; also what runs on a CPU."""

import torch
from torch import Tensor
from torch.nn import functional as F


def dispatch_lists(routing_map_TE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the op's docstring; without a capacity."""
    num_experts = routing_map_TE.shape[1]
    expert_N, token_N = (column.clone() for column in routing_map_TE.t().nonzero().unbind(1))  # an op returns no views
    pair_N = token_N * num_experts + expert_N
    expert_offsets = F.pad(routing_map_TE.sum(0).cumsum(0), (1, 0))
    token_offsets = F.pad(routing_map_TE.sum(1).cumsum(0), (1, 0))
    row_N = torch.argsort(pair_N)  # pairs are distinct: no ties, the same order every run
    return token_N, pair_N, row_N, expert_offsets, token_offsets, routing_map_TE.sum()
