"""From the tensors of a Megatron GPT model, whole and layer by layer, to ours; every name must be used."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from remoe.errors import CheckpointError
from remoe.model import ReMoEConfig

_OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",  # fused by TransformerEngine
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "mlp.router.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_QKV, _DENSE_FC1 = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"
EXTRA_STATE = "_extra_state"  # what TransformerEngine scales fp8 by; no weights
_CELL = "mlp.router.cell."
_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.linear_fc([12])\.weight")
_EXPERT_NAMES = {"1": "mlp.experts.gate_up_proj", "2": "mlp.experts.down_proj"}


def to_native(tensors: Mapping[str, Tensor], config: ReMoEConfig) -> dict[str, Tensor]:
    """Our state dict of a model's tensors, named as GPTModel with SequentialMLP names them on one rank.

    Parameters or their gradients. Raises CheckpointError for a tensor that has no place in ours, and for experts that
    are not all there.
    """
    native: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.endswith(EXTRA_STATE):
            continue
        layer = _LAYER_NAME.fullmatch(name)
        expert = _EXPERT.fullmatch(layer[2]) if layer else None
        if layer and expert:
            stacked = f"model.layers.{layer[1]}.{_EXPERT_NAMES[expert[2]]}"
            experts.setdefault(stacked, {})[int(expert[1])] = tensor
            continue
        new = _layer_tensor(layer, tensor, config) if layer else {_outer_name(name): tensor}
        twice = new.keys() & native.keys()
        if twice:
            raise CheckpointError(f"the checkpoint has {name!r} and another tensor for {min(twice)!r}")
        native |= new
    for name, by_number in experts.items():
        if sorted(by_number) != list(range(len(by_number))):
            raise CheckpointError(f"the checkpoint has experts {sorted(by_number)} for {name}, some are missing")
        native[name] = torch.stack([by_number[number] for number in range(len(by_number))])
    return native


def _outer_name(name: str) -> str:
    if name not in _OUTER:
        raise CheckpointError(f"the checkpoint has a tensor {name!r}, which has no place in a remoe model")
    return _OUTER[name]


def _layer_tensor(layer: re.Match[str], tensor: Tensor, config: ReMoEConfig) -> dict[str, Tensor]:
    prefix, name = f"model.layers.{layer[1]}.", layer[2]
    if name == _QKV:
        return {f"{prefix}self_attn.{key}_proj.weight": part for key, part in _split_qkv(tensor, config).items()}
    if name == _DENSE_FC1:
        gate, up = tensor.chunk(2)
        return {f"{prefix}mlp.gate_proj.weight": gate, f"{prefix}mlp.up_proj.weight": up}
    if name in _LAYER:
        return {prefix + _LAYER[name]: tensor}
    if name.startswith(_CELL):
        return {name.replace(_CELL, "model.router_cell."): tensor}
    if name.startswith("mlp.router."):  # what recurrent routers have besides keeps its name
        return {prefix + name: tensor}
    raise CheckpointError(f"the checkpoint has a tensor {layer[0]!r}, which has no place in a remoe model")


def _split_qkv(weight: Tensor, config: ReMoEConfig) -> dict[str, Tensor]:
    """Each key/value head's rows come together: its queries, then key, then value."""
    groups, size = config.kv_heads, config.head_width
    queries = config.num_heads // groups
    if weight.shape[0] != groups * (queries + 2) * size:
        raise CheckpointError(
            f"linear_qkv has {weight.shape[0]} rows, must be {groups * (queries + 2) * size} with {config.num_heads} "
            f"heads, {groups} of them for keys and values, of width {size}"
        )
    grouped = weight.view(groups, (queries + 2) * size, weight.shape[1])
    parts = grouped.split((queries * size, size, size), dim=1)
    return {key: part.reshape(-1, weight.shape[1]) for key, part in zip("qkv", parts, strict=True)}
