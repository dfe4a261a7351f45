"""A small MoE model of torchtitan's that trains on a CPU."""

import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchtitan.components.optimizer import default_adamw
from torchtitan.models.qwen3 import model_registry
from torchtitan.protocols.module import Module

VOCABULARY = 2048
ONE_PROCESS = SimpleNamespace(
    spmd_backend="spmd_types", tp_enabled=False, ep_enabled=False, cp_enabled=False, pp_enabled=False,
    get_optional_mesh=lambda _: None,
)  # fmt: skip


class PlainAttention(Module):
    """torchtitan's own attention has no backward pass on a CPU."""

    def forward(self, query: Any, key: Any, value: Any, scale: Any = None, enable_gqa: bool = False, **_: Any) -> Any:
        heads = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=enable_gqa)
        return mixed.transpose(1, 2)


class PlainAttentionConfig(Module.Config):
    """Builds it."""

    def build(self, **_: Any) -> PlainAttention:
        return PlainAttention()


def small_spec() -> Any:
    """torchtitan's MoE debug model, with two layers of eight experts."""
    spec = model_registry("debugmodel_moe")
    spec.model = copy.deepcopy(spec.model)
    spec.model.layers = spec.model.layers[:2]
    for layer in spec.model.layers:
        layer.attention.inner_attention = PlainAttentionConfig()
        moe = layer.moe
        moe.num_experts = moe.router.num_experts = moe.router.gate.out_features = 8
        moe.routed_experts.inner_experts.num_experts = moe.routed_experts.token_dispatcher.num_experts = 8
        moe.router.top_k = moe.routed_experts.token_dispatcher.top_k = 2
    return spec


def built(spec: Any) -> Any:
    """The model of a spec, with the same weights on each call."""
    torch.manual_seed(0)
    model = spec.model.build()
    model.init_states(buffer_device=torch.device("cpu"))
    return model


def batch(rows: slice = slice(None)) -> Tensor:
    """Token ids [B, 33] of a batch of two rows."""
    return torch.randint(VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(1))[rows]


def train(
    model: Any, spec: Any, steps: int, tokens_BL: Tensor, tokens_per_step: int, dims: Any = ONE_PROCESS
) -> list[float]:
    """Train with torchtitan's optimizer container; the loss is a sum over tokens divided by those of a step."""
    optimizers = default_adamw(lr=3e-3).build(model_parts=[model])
    spec.post_optimizer_build_fn(optimizers, [model], dims)
    found = []
    for _ in range(steps):
        logits_BLV = model(tokens_BL[:, :-1])
        labels_T = tokens_BL[:, 1:].flatten()
        loss = F.cross_entropy(logits_BLV.flatten(0, 1).float(), labels_T, reduction="sum") / tokens_per_step
        optimizers.zero_grad()
        loss.backward()
        optimizers.step()
        found.append(loss.item())
    return found
