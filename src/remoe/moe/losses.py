"""Auxiliary losses of one layer: pure functions of its Routing, un-weighted scalars.

`loads_E` is the share of tokens at each expert, n_e / T, where it was counted elsewhere (over all data ranks, or in the
previous step); None counts it from the routing itself. Loads never carry a gradient.
"""

import torch
from torch import Tensor

from remoe.moe.routing import Routing, count_tokens


def sparsity_l1(routing: Routing, top_k: int, load_balanced: bool = True, loads_E: Tensor | None = None) -> Tensor:
    """(1/T) sum of f_e R_te with f_e = (E/k) n_e/T (ReMoE eq. 10), or f_e = 1: plain L1 (eq. 9). top_k is k*G."""
    gates_TE = routing.weights_TE if routing.penalized_TE is None else routing.penalized_TE
    gate_sums_E = gates_TE.sum(0) / _token_count(routing)
    if not load_balanced:
        return gate_sums_E.sum()
    num_experts = routing.weights_TE.shape[1]
    load_factor_E = expert_loads(routing, loads_E) * (num_experts / top_k)
    return (load_factor_E.to(gate_sums_E.dtype) * gate_sums_E).sum()


def load_balancing(routing: Routing, top_k: int | Tensor, loads_E: Tensor | None = None) -> Tensor:
    """E sum_e F_e P_e with F_e = n_e/(kT) and P_e the mean softmax probability (ReMoE §4.2); 1 at uniform load."""
    logits_TE = _logits(routing, "load_balancing")
    probs_E = _token_mean(routing, logits_TE.softmax(dim=-1))
    share_E = expert_loads(routing, loads_E) / top_k
    return logits_TE.shape[1] * (share_E.to(probs_E.dtype) * probs_E).sum()


def router_z(routing: Routing) -> Tensor:
    """Mean squared logsumexp of the router logits: keeps them small (ST-MoE)."""
    logits_TE = _logits(routing, "router_z")
    return _token_mean(routing, torch.logsumexp(logits_TE, dim=-1, keepdim=True).square()).squeeze(0)


def expert_loads(routing: Routing, loads_E: Tensor | None = None) -> Tensor:
    """Share of tokens at each expert, n_e / T, fp32 or wider [E]; given loads pass through."""
    if loads_E is not None:
        return loads_E.detach()
    counts_E = routing.routing_map_TE.sum(0)
    return counts_E.to(routing.weights_TE.dtype) / _token_count(routing)


def _token_count(routing: Routing) -> Tensor:
    return count_tokens(routing).clamp(min=1).to(routing.weights_TE.dtype)


def _token_mean(routing: Routing, values_TX: Tensor) -> Tensor:
    if routing.token_mask_T is not None:
        values_TX = values_TX.masked_fill(~routing.token_mask_T[:, None], 0)
    return values_TX.sum(0) / _token_count(routing)


def _logits(routing: Routing, loss: str) -> Tensor:
    assert routing.logits_TE is not None, f"{loss} needs a router with logits"
    return routing.logits_TE
