"""Our model config for a Megatron checkpoint, from the arguments it was trained with and the shapes it has."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from remoe.errors import CheckpointError, ConfigError
from remoe.model import ReMoEConfig

_NEEDED: dict[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "apply_layernorm_1p": False,
    "multi_latent_attention": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_router_topk_scaling_factor": None,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_expert_capacity_factor": None,
}
"""What an argument must be, where the checkpoint has it: our model computes nothing else."""


def config_for(
    tensors: Mapping[str, Tensor], args: Mapping[str, Any], router: str | dict[str, Any] | None = None
) -> ReMoEConfig:
    """The config of the model with these tensors, named as on one rank.

    `router`: which one it was trained with; None: ReLU, or Top-K, as the arguments of ReMoE's code say. Raises
    CheckpointError for arguments of a model that ours is not.
    """
    for key, needed in _NEEDED.items():
        if args.get(key, needed) != needed:
            raise CheckpointError(f"the checkpoint was trained with {key} = {args[key]!r}, must be {needed!r}")
    embedding = _tensor(tensors, "embedding.word_embeddings.weight")
    layers = _layers(tensors)
    num_experts, expert_size = _experts(tensors)
    granularity = int(_argument(args, "moe_granularity", 1))
    heads = int(_argument(args, "num_attention_heads"))
    head_size = int(_argument(args, "kv_channels"))
    try:
        return ReMoEConfig(
            vocab_size=embedding.shape[0],
            hidden_size=embedding.shape[1],
            num_layers=len(layers),
            num_heads=heads,
            num_kv_heads=int(args.get("num_query_groups") or heads) if args.get("group_query_attention") else heads,
            head_size=None if head_size * heads == embedding.shape[1] else head_size,
            intermediate_size=expert_size * granularity if num_experts else int(_argument(args, "ffn_hidden_size")),
            num_experts=num_experts // granularity if num_experts else 1,
            top_k=int(_argument(args, "moe_router_topk", 1)) if num_experts else 1,
            granularity=granularity if num_experts else 1,
            router=_router(args) if router is None else router,
            moe_layers="all" if all(layers) else [layer for layer, has_experts in enumerate(layers) if has_experts],
            tie_embeddings="output_layer.weight" not in tensors,
            rope_theta=float(_argument(args, "rotary_base")),
            norm_eps=float(_argument(args, "norm_epsilon")),
            init_std=float(args.get("init_method_std") or 0.02),
        )
    except ConfigError as error:
        raise CheckpointError(f"the checkpoint's arguments do not fit its tensors: {error}") from error


def _router(args: Mapping[str, Any]) -> str | dict[str, Any]:
    if args.get("moe_relu_routing"):
        return "relu"
    return {"name": "topk", "renormalize": not args.get("moe_router_pre_softmax", False)}


def _layers(tensors: Mapping[str, Tensor]) -> list[bool]:
    """Whether each layer has experts."""
    found: dict[int, bool] = {}
    for name in tensors:
        layer = re.match(r"decoder\.layers\.(\d+)\.(mlp\.experts\.)?", name)
        if layer is not None:
            found[int(layer[1])] = found.get(int(layer[1]), False) or layer[2] is not None
    if sorted(found) != list(range(len(found))):
        raise CheckpointError(f"the checkpoint has the layers {sorted(found)}, some are missing")
    return [found[layer] for layer in range(len(found))]


def _experts(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Experts of a layer after granularity, and the width of one; 0 and 0 for a dense model."""
    numbers = [re.search(r"\.local_experts\.(\d+)\.linear_fc2\.weight$", name) for name in tensors]
    experts = [match for match in numbers if match is not None]
    if not experts:
        return 0, 0
    return 1 + max(int(match[1]) for match in experts), tensors[experts[0].string].shape[1]


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"the checkpoint has no tensor {name!r}; it is not that of a Megatron GPT model")
    return tensors[name]


def _argument(args: Mapping[str, Any], key: str, otherwise: Any = None) -> Any:
    value = args.get(key)
    value = otherwise if value is None else value
    if value is None:
        raise CheckpointError(f"the checkpoint's arguments do not say {key}; it was saved without its args")
    return value
