"""A fresh model that routes as a trained one: k of E experts a token on average, as many tokens at each expert.

A ReLU router without a bias can only be sparse where tokens share a direction, as trained models do and fresh ones do
not. So the embedding gets one (a constant as large as its spread), and from each router's weights the part along it is
taken away: for Top-K all of it, which evens the loads; for ReLU more, w_e - c_e m with m the mean of the layer's
inputs, where c_e is the 1 - k/E quantile of <w_e, x> / <m, x> over the tokens given: exactly k/E of them stay above 0.
Layers are set one after the other, each on the inputs that those before it produce.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from remoe.errors import ConfigError
from remoe.model import ReMoEForCausalLM
from remoe.moe import MoE, moe_layers
from remoe.moe.experts import GroupedExperts

ROUTERS = ("relu", "topk")
_KEPT_ROWS_PER_TOKEN = 1 / 16
"""Of experts, while routers are set."""


@torch.no_grad()
def share_a_direction(model: ReMoEForCausalLM) -> None:
    """Add to all embeddings the same constant, as large as their standard deviation."""
    embedding = model.model.embed_tokens.weight
    embedding.add_(embedding.std())


@torch.no_grad()
def settle(model: ReMoEForCausalLM, tokens_BS: Tensor) -> None:
    """Set the routers as the module says, on these tokens; call `share_a_direction` before.

    Tokens of one random sequence are alike in deep layers, so few sequences are few samples: on others up to a tenth
    more gates opened.
    """
    layers = settable_layers(model)
    in_chunks = {"kept_rows_per_token": _KEPT_ROWS_PER_TOKEN, "keeps_all_rows": False}  # memory may be short
    with _settled_before_use(layers), experts_with(layers, **in_chunks):
        model(tokens_BS, logits_to_keep=1)


def settable_layers(model: nn.Module) -> list[MoE]:
    """The model's MoE layers in order; ConfigError for routers that cannot be set."""
    layers = moe_layers(model)
    for layer in layers:
        if layer.config.router_name not in ROUTERS or layer.config.router_options:
            raise ConfigError(f"router is {layer.config.router!r}, must be relu or topk without options in a benchmark")
    return layers


@contextmanager
def _settled_before_use(layers: list[MoE]) -> Iterator[None]:
    handles = [layer.router.register_forward_pre_hook(_hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def experts_with(layers: list[MoE], **settings: Any) -> Iterator[None]:
    """Inside, let the layers' SwiGLU experts have these attributes; others have none of them."""
    grouped = [layer.experts for layer in layers if isinstance(layer.experts, GroupedExperts)]
    before = [{name: getattr(experts, name) for name in settings} for experts in grouped]
    _set(grouped, [settings] * len(grouped))
    try:
        yield
    finally:
        _set(grouped, before)


def _set(modules: Sequence[nn.Module], values: Sequence[dict[str, Any]]) -> None:
    for module, own in zip(modules, values, strict=True):
        for name, value in own.items():
            setattr(module, name, value)


def _hook(layer: MoE) -> Any:
    density = layer.config.routed_top_k / layer.config.routed_experts

    def before(router: Any, inputs: tuple[Any, ...]) -> None:
        weight_EH = router.weight
        hidden_TH = inputs[0].to(weight_EH.dtype)
        with torch.autocast(weight_EH.device.type, enabled=False):  # bf16 would tie logits, and open 1 % more gates
            if layer.config.router_name == "relu":
                weight_EH.copy_(sparse_weight(weight_EH, hidden_TH, density))
            else:
                weight_EH.copy_(even_weight(weight_EH, hidden_TH))

    return before


def sparse_weight(weight_EH: Tensor, hidden_TH: Tensor, density: float) -> Tensor:
    """w_e - c_e m, whose product with x is above 0 for this share of the tokens at each expert."""
    mean_H = hidden_TH.mean(0)
    along_T = hidden_TH @ mean_H
    assert bool((along_T > 0).all()), "tokens share no direction: an input points away from the mean"
    ratios_TE = (hidden_TH @ weight_EH.t()) / along_T[:, None]
    rank = max(1, ratios_TE.shape[0] - round(density * ratios_TE.shape[0]))
    return weight_EH - ratios_TE.kthvalue(rank, dim=0).values[:, None] * mean_H


def even_weight(weight_EH: Tensor, hidden_TH: Tensor) -> Tensor:
    """w_e without its part along the mean: no expert's logits are above the others' on average."""
    mean_H = hidden_TH.mean(0)
    return weight_EH - (weight_EH @ mean_H)[:, None] * mean_H / mean_H.square().sum()
