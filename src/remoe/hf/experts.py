"""Our experts' kernels for every mixture of experts in transformers: experts implementation "remoe"."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from remoe.errors import ConfigError
from remoe.kernels.expert_mlp import expert_mlp
from remoe.moe.dispatch import plan
from remoe.moe.experts import compute_dtype

NAME = "remoe"
_PLAIN = {  # attributes of transformers' experts, and what SwiGLU experts without biases have there
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}


def remoe_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run each token's experts through remoe::expert_mlp: [T, H]. Pairs of weight 0 cost nothing.

    Takes transformers' contract: index and weights [T, K], `gate_up_proj` [E, 2F, H], `down_proj` [E, H, F]. An index
    of E stands for no expert, as under expert parallelism. ConfigError for experts that are no plain SwiGLU.
    """
    check_plain(self)
    num_experts = self.gate_up_proj.shape[0]
    padded = top_k_weights.new_zeros(hidden_states.shape[0], num_experts + 1)
    weights_TE = padded.scatter_add(1, top_k_index.clamp(max=num_experts), top_k_weights)[:, :num_experts]
    weights_TE = weights_TE.to(torch.promote_types(weights_TE.dtype, torch.float32)).contiguous()
    dtype = compute_dtype(hidden_states)
    out_TH, _ = expert_mlp(
        hidden_states.to(dtype),
        weights_TE,
        self.gate_up_proj.to(dtype),
        self.down_proj.to(dtype),
        *plan(weights_TE != 0).lists,
    )
    return out_TH.to(hidden_states.dtype)


def check_plain(experts: Any) -> None:
    """Raise ConfigError for experts that are not down(silu(gate x) * (up x)) without biases."""
    name = type(experts).__name__
    for attribute, plain in _PLAIN.items():
        if getattr(experts, attribute, plain) != plain:
            raise ConfigError(
                f"experts of {name} have {attribute} = {not plain}, must be {plain} for experts implementation "
                f"{NAME!r}; use set_experts_implementation('grouped_mm')"
            )
    is_swiglu = type(experts)._apply_gate is _default_apply_gate and isinstance(
        experts.act_fn, (nn.SiLU, SiLUActivation)
    )
    if not is_swiglu:
        raise ConfigError(
            f"experts of {name} have an activation of their own, must be silu(gate) * up for experts implementation "
            f"{NAME!r}; use set_experts_implementation('grouped_mm')"
        )


def register() -> None:
    """Make the implementation known to transformers."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, remoe_experts_forward)
