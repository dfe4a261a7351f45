"""What a layer's Routing says about itself: pure functions; masked tokens never count."""

from collections.abc import Sequence

import torch
from torch import Tensor

from remoe.moe.routing import Routing, count_tokens


def active_pairs(routing: Routing) -> Tensor:
    """Number of active (token, expert) pairs: 0-dim int64."""
    return routing.routing_map_TE.sum()


def total_pairs(routing: Routing) -> Tensor:
    """Number of pairs that could be active, tokens * E: 0-dim int64."""
    return count_tokens(routing) * routing.routing_map_TE.shape[1]


def density(routing: Routing) -> Tensor:
    """Active share of all pairs, 1 - sparsity: 0-dim, between 0 and 1 (0 without tokens)."""
    return active_pairs(routing) / total_pairs(routing).clamp(min=1)


def tokens_per_expert(routing: Routing) -> Tensor:
    """Tokens at each expert: int64 [E]."""
    return routing.routing_map_TE.sum(0)


def active_per_token(routing: Routing) -> Tensor:
    """Experts of each token, 0 to E: int64 [T] (0 for masked tokens)."""
    return routing.routing_map_TE.sum(1)


def tokens_without_expert(routing: Routing) -> Tensor:
    """How many tokens that count have no expert: 0-dim int64."""
    idle_T = ~routing.routing_map_TE.any(dim=1)
    if routing.token_mask_T is not None:
        idle_T = idle_T & routing.token_mask_T
    return idle_T.sum()


def load_entropy(routing: Routing) -> Tensor:
    """Entropy of the experts' shares of the load in nats: log E when even, 0 when one expert takes all."""
    counts_E = tokens_per_expert(routing).to(torch.float64)
    share_E = counts_E / counts_E.sum().clamp(min=1)
    return -torch.xlogy(share_E, share_E).sum()


def gate_entropy(routing: Routing) -> Tensor:
    """Entropy of each token's softmax over all experts in nats: float64 [T] (RMoE Fig. 4)."""
    log_probs_TE = _log_probs(routing)
    return -(log_probs_TE.exp() * log_probs_TE).sum(dim=1)


def inner_balance(routing: Routing) -> Tensor:
    """IB: each token's largest softmax probability over its second largest: float64 [T], from 1 on (RMoE table 8)."""
    first_two_T2 = _log_probs(routing).topk(2, dim=1).values
    return (first_two_T2[:, 0] - first_two_T2[:, 1]).exp()


def outer_balance(routing: Routing) -> Tensor:
    """OB: the softmax probability that each token gives to its active experts: float64 [T], up to 1 (RMoE table 8)."""
    return _log_probs(routing).exp().masked_fill(~routing.routing_map_TE, 0).sum(dim=1)


def _log_probs(routing: Routing) -> Tensor:
    assert routing.logits_TE is not None, "this statistic needs a router with logits"
    return routing.logits_TE.double().log_softmax(dim=1)


def flip_rate(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Share of (layer, token, expert) switches that changed between two sets of routing maps (ReMoE Fig. 10).

    Each set holds one bool map [T, E] a layer. Times E it is the flip count per token and layer.
    """
    flips = sum(((a != b).sum() for a, b in zip(before, after, strict=True)), torch.zeros((), dtype=torch.int64))
    return flips / sum(a.numel() for a in before)
