"""Help for layers that starve and experts that idle: both get no gradient by themselves, as a closed gate has none.

A layer starves when its density is below a floor, a share of the target density k/E. Then the L1 term spares it, and
each of its tokens without an expert pulls at its nearest gate. An expert that no token uses is pulled at by the tokens
nearest to it, as many as the floor asks for. Pure functions of a Routing: what starves is measured there, not kept.
"""

import math

import torch
from torch import Tensor

from remoe.errors import ConfigError
from remoe.moe.routing import Routing, count_tokens
from remoe.moe.stats import active_pairs


def is_starving(routing: Routing, top_k: int, floor: float) -> Tensor:
    """Whether fewer than floor * k/E of the pairs are active: 0-dim bool. top_k is k*G, as E is E*G."""
    return active_pairs(routing) < floor * top_k * count_tokens(routing)


def revival(routing: Routing, top_k: int, floor: float) -> Tensor:
    """How far the closed gates that should open are from opening: un-weighted scalar, 0 when nothing needs help.

    Mean of -max_e logit_te over all tokens, counting those without an expert, if the layer starves; plus the mean over
    experts of the distance of idle ones to their nearest tokens.
    """
    if routing.logits_TE is None:
        raise ConfigError("the revival term needs router logits; this router has none, set sparsity.revival_coef to 0")
    counted_T1 = _counted(routing)
    logits_TE = routing.logits_TE.masked_fill(~counted_T1, -math.inf)
    tokens = count_tokens(routing).clamp(min=1)
    starved_T = is_starving(routing, top_k, floor) & counted_T1[:, 0] & ~routing.routing_map_TE.any(1)
    to_gate_T = torch.where(starved_T, -logits_TE.amax(1), 0)
    return to_gate_T.sum() / tokens + _to_idle_experts(logits_TE, routing.routing_map_TE, top_k, floor)


def _to_idle_experts(logits_TE: Tensor, routing_map_TE: Tensor, top_k: int, floor: float) -> Tensor:
    num_tokens, num_experts = logits_TE.shape
    if num_tokens == 0:
        return logits_TE.sum()
    nearest = min(num_tokens, max(1, math.ceil(floor * top_k / num_experts * num_tokens)))
    distance_KE = -logits_TE.topk(nearest, dim=0).values
    helped_KE = ~routing_map_TE.any(0) & distance_KE.isfinite()
    return torch.where(helped_KE, distance_KE, 0).mean()


def _counted(routing: Routing) -> Tensor:
    """Bool [T, 1]: tokens that count."""
    if routing.token_mask_T is not None:
        return routing.token_mask_T[:, None]
    return routing.routing_map_TE.new_ones((routing.routing_map_TE.shape[0], 1))
