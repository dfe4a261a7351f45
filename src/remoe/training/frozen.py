"""Routers that stay as they start while the rest is fine-tuned (RMoE §3.17)."""

from torch import nn

from remoe.errors import ConfigError

MODES = ("none", "head", "head_and_cell", "all")
_PROJECTORS = ("projector", "projector_bias")


def freeze_routers(model: nn.Module, mode: str) -> None:
    """Stop training router weights, before the optimizer is built. Raises ConfigError where there are none.

    `head`: what makes logits, "freeze router" there (a router without a state: all of it). `head_and_cell`: and the
    shared cell, "freeze router and GRU". `all`: and the projections P_i, which the paper leaves open.
    """
    if mode == "none":
        return
    frozen = [parameter for name, parameter in model.named_parameters() if is_frozen(name, mode)]
    if not frozen:
        raise ConfigError(f"train.freeze_router is {mode!r}, but the model has no router; set it to none")
    for parameter in frozen:
        parameter.requires_grad_(False)


def is_frozen(name: str, mode: str) -> bool:
    """Whether a mode keeps the parameter of this name."""
    parts = name.split(".")
    if "router_cell" in parts:
        return mode in ("head_and_cell", "all")
    if "router" not in parts:
        return False
    return mode == "all" or parts[-1] not in _PROJECTORS
