"""What the trainer tells routers that have a running state of their own; see `moe.routing.Router` for the calls."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from remoe.data.dataset import AnyDataset
from remoe.data.token_counts import token_counts
from remoe.moe.routing import Routing
from remoe.training.counts import RoutingCounts

Observed = dict[int, Tensor]
"""By the router's place among the MoE layers; only those that observe."""


def prepare(routers: Sequence[Any], dataset: AnyDataset, vocab_size: int, first_layer: int = 0) -> None:
    """Before the first step: hand the training text's token counts to the routers that ask for them.

    `first_layer` is the number of the first router's layer, among the MoE layers.
    """
    asking = [
        (layer, router)
        for layer, router in enumerate(routers, first_layer)
        if getattr(router, "needs_token_counts", False)
    ]
    if not asking:
        return
    counts_V = torch.from_numpy(token_counts(dataset, vocab_size))
    for layer, router in asking:
        router.prepare(counts_V, layer)


@torch.no_grad()
def observe(routers: Sequence[Any], routings: Sequence[Routing], share: float) -> Observed:
    """What the routers want to know of one micro-batch that is `share` of a step."""
    pairs = enumerate(zip(routers, routings, strict=True))
    return {layer: share * router.observe(routing) for layer, (router, routing) in pairs if hasattr(router, "observe")}


def added(observed: Observed, more: Observed) -> Observed:
    """The sum over micro-batches."""
    return {layer: observed[layer] + value if observed else value for layer, value in more.items()}


@torch.no_grad()
def after_step(routers: Sequence[Any], counts: RoutingCounts, observed: Observed, skipped: Tensor, step: int) -> None:
    """Let the routers move their running state, except where the step was cancelled."""
    for layer, (router, tokens_per_expert_E) in enumerate(zip(routers, counts.tokens_per_expert_LE, strict=True)):
        with unless(skipped, router):
            if layer in observed:
                router.absorb(observed[layer])
            if hasattr(router, "after_step"):
                router.after_step(tokens_per_expert_E, step)


@contextmanager
def unless(skipped: Tensor, module: nn.Module) -> Iterator[None]:
    """Undo what happens inside to the module's buffers where `skipped` is true, on the device."""
    before: Mapping[str, Tensor] = {name: buffer.clone() for name, buffer in module.named_buffers()}
    yield
    for name, buffer in module.named_buffers():
        buffer.copy_(torch.where(skipped, before[name], buffer))
