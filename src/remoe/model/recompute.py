"""What of a layer is kept for the backward pass, and what is computed again in it."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from remoe.config import check_choice

MODES = ("none", "full", "selective")
"""none keeps all; full keeps each layer's input alone; selective also what the experts' kernels need: then only cheap
parts (norms, attention, router) are computed again."""

RunLayer = Callable[..., Any]


def recomputation(key: str, value: bool | str) -> str:
    """One of MODES, of which true is full and false is none. ConfigError, naming the key, for another word."""
    if isinstance(value, bool):
        return "full" if value else "none"
    check_choice(key, value, MODES)
    return value


def layer_runner(mode: str, draws: bool) -> RunLayer:
    """How to call a layer. `draws` says whether it uses random numbers, which must then be the same the second time."""
    if mode == "none":
        return _run
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_own_ops)
    return functools.partial(checkpoint, **options)


def _run(layer: nn.Module, *inputs: Any) -> Any:
    return layer(*inputs)


def _keep_own_ops(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """Keep what our kernels return, lists and pre-activations, and compute all else again."""
    is_own = getattr(operation, "namespace", None) == "remoe"
    return CheckpointPolicy.MUST_SAVE if is_own else CheckpointPolicy.PREFER_RECOMPUTE
