"""The density dial: a threshold on ReLU gates that trades loss against experts per token after training."""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def dials(model: nn.Module) -> list[Any]:
    """The routers whose gate has a threshold, in the order of their layers; none in a Top-K or dense model.

    Each returns its `logits_TE`, among other things, and uses the experts whose logit is above `threshold`: routers of
    ours, and the gates of converted models of transformers.
    """
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
def recorded(model: nn.Module) -> Generator[list[Any]]:
    """What each router with a threshold returns inside, call after call."""
    outputs: list[Any] = []

    def record(router: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        outputs.append(output)

    with ExitStack() as hooks:
        for router in dials(model):
            hooks.callback(router.register_forward_hook(record).remove)
        yield outputs


@contextmanager
def choosing_thresholds(
    model: nn.Module, active_L: Sequence[float], counted_T: Tensor | None = None
) -> Generator[None]:
    """Inside, each MoE layer that is called first sets its threshold so that tokens use `active_L[layer]` experts.

    That is a mean over the tokens of the call, of those in `counted_T` where it is given. A layer sees what the layers
    before it made with theirs, so one forward pass over a text chooses for all. The thresholds stay when the context
    ends.
    """
    with ExitStack() as hooks:
        for router, active in zip(dials(model), active_L, strict=True):
            hooks.callback(router.register_forward_pre_hook(_chooser(active, counted_T)).remove)
        yield


def _chooser(active: float, counted_T: Tensor | None) -> Callable[[Any, tuple[Any, ...]], None]:
    @torch.no_grad()
    def choose(router: Any, inputs: tuple[Any, ...]) -> None:
        routing = router.forward(*inputs)  # not router(...), which would come here again
        logits_TE = counted(routing.logits_TE, counted_T)
        router.threshold = threshold_for(logits_TE, round(active * len(logits_TE)))

    return choose


def counted(logits_TE: Tensor, counted_T: Tensor | None) -> Tensor:
    """The rows of tokens that count; None: all."""
    return logits_TE if counted_T is None else logits_TE[counted_T]


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
