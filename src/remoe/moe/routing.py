"""What a router is given and what it returns: the contract between routers, the layer, losses and statistics."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Merging(NamedTuple):
    """What merged experts need (Lory): runs of tokens, each with one expert made of all E by its weights."""

    first_J: Tensor
    """int64 [J], ascending from 0: where each run begins."""
    weights_JE: Tensor
    """The share of each expert in a run's merged one."""
    counted_T: Tensor
    """Bool: tokens that are not masked; the others get 0."""


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

    merging: Merging | None = None
    """Set by routers whose experts are merged ones, else None."""
    needs: Tensor | None = None
    """Where ranks share experts, what a capacity must hold, int64 [2]: the most rows that one rank sends another, and
    the most active pairs at one; as far as this rank knows. Else None."""


class RouterContext(NamedTuple):
    """What a router may need besides hidden states; each field None if absent."""

    state_TP: Tensor | None = None
    token_ids_T: Tensor | None = None
    token_mask_T: Tensor | None = None
    sequence_start_T: Tensor | None = None
    """Bool: first token of each sequence or packed document."""
    layer_index: int | None = None
    cache: Any = None
    """While text is generated: a dict in which a router may keep, by layer_index, what it needs of earlier tokens."""


class Router(Protocol):
    """Maps hidden_TH to a Routing. The linear ones hold `weight` [E, H].

    What a router may have besides: `experts`, the kind it works with ("grouped" unless it says "merged"); and, called
    by the trainer: `prepare(token_counts_V, layer_index)` before the first step where `needs_token_counts`, with how
    often each token id occurs in the training text; `observe(routing)`, a tensor with what it wants to know of a
    micro-batch; after the optimizer's step `absorb(observed)` with the mean of those, then
    `after_step(tokens_per_expert_E, step)`. A router that can be evaluated in several ways names them in `evaluations`
    and the one in force in `evaluation`. `mixes_tokens` is true where a token's routing depends on others of the call.
    """

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
    penalized_TE = routing.penalized_TE
    return Routing(  # torch 2.11 cannot return the result of `_replace` from a compiled graph
        routing.weights_TE.masked_fill(~mask_T1, 0),
        routing.routing_map_TE & mask_T1,
        routing.logits_TE,
        routing.state_TP,
        context.token_mask_T,
        routing.overflow,
        None if penalized_TE is None else penalized_TE.masked_fill(~mask_T1, 0),
        routing.merging,
    )
