"""The density dial: a threshold on ReLU gates that trades loss against experts per token after training."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from remoe.moe.routing import RouterContext, count_tokens


def dials(model: nn.Module) -> list[Any]:
    """The routers whose gate has a threshold, in the order of their layers; none in a Top-K or dense model."""
    return [module for module in model.modules() if getattr(module, "threshold", None) is not None]


def thresholds(model: nn.Module) -> list[float]:
    """The threshold of each MoE layer, in units of its router's logits; 0 is the trained gate."""
    return [router.threshold for router in dials(model)]


def set_thresholds(model: nn.Module, values: Sequence[float]) -> None:
    """Set the threshold of each MoE layer that has one."""
    for router, value in zip(dials(model), values, strict=True):
        router.threshold = float(value)


@contextmanager
def thresholds_at(model: nn.Module, values: Sequence[float]) -> Generator[None]:
    """Route with other thresholds inside."""
    before = thresholds(model)
    set_thresholds(model, values)
    try:
        yield
    finally:
        set_thresholds(model, before)


@contextmanager
def choosing_thresholds(model: nn.Module, active_L: Sequence[float]) -> Generator[None]:
    """Inside, each MoE layer that is called first sets its threshold so that tokens use `active_L[layer]` experts.

    That is a mean over the tokens of the call. A layer sees what the layers before it made with theirs, so one forward
    pass over a text chooses for all. The thresholds stay when the context ends.
    """
    with ExitStack() as hooks:
        for router, active in zip(dials(model), active_L, strict=True):
            hooks.enter_context(_Chooser(router, active))
        yield


class _Chooser:
    """A hook on one router, there while the context is open."""

    def __init__(self, router: Any, active: float) -> None:
        self.router = router
        self.active = active

    def __enter__(self) -> None:
        self._handle = self.router.register_forward_pre_hook(self)

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()

    @torch.no_grad()
    def __call__(self, router: Any, inputs: tuple[Tensor, RouterContext | None]) -> None:
        routing = router.forward(*inputs)  # not router(...), which would come here again
        logits_TE = routing.logits_TE if routing.token_mask_T is None else routing.logits_TE[routing.token_mask_T]
        router.threshold = threshold_for(logits_TE, round(self.active * int(count_tokens(routing))))


def threshold_for(logits_TE: Tensor, num_pairs: int) -> float:
    """The threshold above which `num_pairs` logits lie, fewer where logits are equal: the largest that stays closed.

    0 where it does the same: the trained gate, to the bit.
    """
    if num_pairs == int((logits_TE > 0).sum()):
        return 0.0
    sorted_N = logits_TE.flatten().sort(descending=True).values
    if num_pairs >= len(sorted_N):
        return min(0.0, float(sorted_N[-1])) - 1.0
    return float(sorted_N[max(0, num_pairs)])
