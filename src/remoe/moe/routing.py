"""What a router is given and what it returns: the contract between routers, the layer, losses and statistics."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Everything a router decided for T tokens and E experts. Masked tokens have weight 0 and no expert."""

    weights_TE: Tensor
    """Gate values, fp32 or wider; 0 where an expert is inactive."""
    routing_map_TE: Tensor
    """Bool: which expert works for which token. An active pair may have weight 0 and still gets its gradient."""
    logits_TE: Tensor | None = None
    """Scores before the gate; None where there are none (hash)."""
    state_TP: Tensor | None = None
    """State for the next layer's router; None for routers without one."""
    token_mask_T: Tensor | None = None
    """Bool: which tokens count in losses and statistics; None: all."""
    overflow: Tensor | None = None
    """0-dim bool of the capacity policy: the buffer was too small, the step must be run again; else None."""
    penalized_TE: Tensor | None = None
    """What the L1 term sums where it is not the weights: the gates before they were normalised; else None."""


class RouterContext(NamedTuple):
    """What a router may need besides hidden states; each field None if absent."""

    state_TP: Tensor | None = None
    token_ids_T: Tensor | None = None
    token_mask_T: Tensor | None = None
    sequence_start_T: Tensor | None = None
    """Bool: first token of each sequence or packed document."""
    layer_index: int | None = None
    cache: Any = None


class Router(Protocol):
    """Maps hidden_TH to a Routing. The linear ones hold `weight` [E, H]."""

    state_size: int
    """Width P of the state handed from layer to layer; 0 for routers without one."""
    penalty: str
    """The auxiliary loss this router is trained with: "sparsity_l1", "load_balancing" or "none"."""

    def __call__(self, hidden_TH: Tensor, context: RouterContext | None = None) -> Routing: ...


def count_tokens(routing: Routing) -> Tensor:
    """Number of tokens that count: 0-dim int64 on the routing's device."""
    if routing.token_mask_T is not None:
        return routing.token_mask_T.sum()
    return routing.routing_map_TE.new_full((), routing.routing_map_TE.shape[0], dtype=torch.int64)


def without_masked_tokens(routing: Routing, context: RouterContext | None) -> Routing:
    """The routing in which the context's masked tokens have weight 0 and no expert."""
    if context is None or context.token_mask_T is None:
        return routing
    mask_T1 = context.token_mask_T[:, None]
    return routing._replace(
        weights_TE=routing.weights_TE.masked_fill(~mask_T1, 0),
        routing_map_TE=routing.routing_map_TE & mask_T1,
        token_mask_T=context.token_mask_T,
        penalized_TE=None if routing.penalized_TE is None else routing.penalized_TE.masked_fill(~mask_T1, 0),
    )
