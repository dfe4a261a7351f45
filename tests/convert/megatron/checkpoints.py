"""Checkpoints as ReMoE's code leaves them, made from a model of ours: the way back, written by itself."""

import argparse
import enum
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from remoe.model import ReMoEConfig, ReMoEForCausalLM

Tensors = dict[str, Tensor]
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 24,
    "num_experts": 4, "top_k": 1, "rope_theta": 1e6, "init_std": 0.02,
}  # fmt: skip


class Backend(enum.Enum):
    """Stands for the enums that Megatron's arguments hold."""

    AUTO = 5


class Sizes(NamedTuple):
    """Ranks of each kind, and model chunks a rank."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    chunks: int = 1


ONE_RANK = Sizes()


def small_model(**changes: Any) -> ReMoEForCausalLM:
    """A model with weights all of which differ."""
    model = ReMoEForCausalLM(ReMoEConfig(**(SMALL | changes)), seed=3)
    with torch.no_grad():
        for norm in (p for name, p in model.named_parameters() if "norm" in name):
            norm.copy_(torch.randn(norm.shape, generator=torch.Generator().manual_seed(norm.numel())))
    return model


def arguments(config: ReMoEConfig, sizes: Sizes = ONE_RANK, **changes: Any) -> argparse.Namespace:
    """What Megatron saves beside a model; ReMoE's code keeps E, k and the width as they are before granularity."""
    values = {
        "num_layers": config.num_layers, "hidden_size": config.hidden_size, "num_attention_heads": config.num_heads,
        "group_query_attention": True, "num_query_groups": config.kv_heads, "kv_channels": config.head_width,
        "ffn_hidden_size": config.intermediate_size, "num_experts": config.num_experts,
        "moe_router_topk": config.top_k, "moe_granularity": config.granularity, "moe_relu_routing": True,
        "moe_router_pre_softmax": True, "rotary_base": int(config.rope_theta), "norm_epsilon": config.norm_eps,
        "normalization": "RMSNorm", "swiglu": True, "position_embedding_type": "rope", "rotary_percent": 1.0,
        "add_bias_linear": False, "init_method_std": config.init_std, "params_dtype": torch.float32,
        "tensor_model_parallel_size": sizes.tensor, "pipeline_model_parallel_size": sizes.pipeline,
        "expert_model_parallel_size": sizes.expert, "attention_backend": Backend.AUTO,
    }  # fmt: skip
    return argparse.Namespace(**(values | changes))


def as_megatron(model: ReMoEForCausalLM) -> Tensors:
    """The model's tensors as GPTModel names them on one rank, with TransformerEngine's fused norms."""
    config, state = model.config, model.state_dict()
    found = {
        "embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": state["model.norm.weight"],
        "output_layer.weight": state["lm_head.weight"],
    }
    for layer in range(config.num_layers):
        ours, theirs = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        found |= {theirs + name: tensor for name, tensor in _layer(state, ours, config)}
    return found


def _layer(state: Tensors, ours: str, config: ReMoEConfig) -> Iterator[tuple[str, Tensor]]:
    query, key, value = (state[f"{ours}self_attn.{name}_proj.weight"] for name in "qkv")
    groups = config.kv_heads
    rows = [part for group in zip(query.chunk(groups), key.chunk(groups), value.chunk(groups), strict=True)
            for part in group]  # fmt: skip
    yield "self_attention.linear_qkv.weight", torch.cat(rows)
    yield "self_attention.linear_qkv.layer_norm_weight", state[f"{ours}input_layernorm.weight"]
    yield "self_attention.linear_proj.weight", state[f"{ours}self_attn.o_proj.weight"]
    norm = state[f"{ours}post_attention_layernorm.weight"]
    if f"{ours}mlp.router.weight" not in state:
        yield "mlp.linear_fc1.layer_norm_weight", norm
        yield "mlp.linear_fc1.weight", torch.cat([state[f"{ours}mlp.{name}_proj.weight"] for name in ("gate", "up")])
        yield "mlp.linear_fc2.weight", state[f"{ours}mlp.down_proj.weight"]
        return
    yield "pre_mlp_layernorm.weight", norm
    yield "mlp.router.weight", state[f"{ours}mlp.router.weight"]
    for number, (first, second) in enumerate(
        zip(state[f"{ours}mlp.experts.gate_up_proj"], state[f"{ours}mlp.experts.down_proj"], strict=True)
    ):
        yield f"mlp.experts.local_experts.{number}.linear_fc1.weight", first
        yield f"mlp.experts.local_experts.{number}.linear_fc2.weight", second


def part_of(name: str, tensor: Tensor, rank: int, num_ranks: int) -> Tensor:
    """A tensor parallel rank's part, by the rules of Megatron's column and row parallel layers."""
    if name.endswith(("embeddings.weight", "output_layer.weight", "linear_qkv.weight")):
        return tensor.chunk(num_ranks)[rank]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(num_ranks, dim=1)[rank]
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(num_ranks)[rank] for half in tensor.chunk(2)])
    return tensor


def split(whole: Tensors, sizes: Sizes, num_layers: int, experts: str = "sequential") -> dict[tuple[int, ...], Any]:
    """What each (tensor, pipeline, expert) rank saves: its model chunks, in one of the three modules for experts."""
    num_parts = sizes.pipeline * sizes.chunks
    depth = num_layers // num_parts
    ranks: dict[tuple[int, ...], Any] = {}
    for tensor in range(sizes.tensor):
        for stage in range(sizes.pipeline):
            for expert in range(sizes.expert):
                chunks = []
                for chunk in range(sizes.chunks):
                    number = chunk * sizes.pipeline + stage
                    local = _local(whole, range(number * depth, (number + 1) * depth), number, num_parts)
                    local = {name: part_of(name, value, tensor, sizes.tensor) for name, value in local.items()}
                    chunks.append(_experts_as(_own_experts(local, expert, sizes.expert), experts))
                ranks[tensor, stage, expert] = chunks
    return ranks


def _local(whole: Tensors, layers: range, part: int, num_parts: int) -> Tensors:
    found = {}
    for name, tensor in whole.items():
        words = name.split(".")
        if words[1] == "layers" and int(words[2]) in layers:
            found[".".join((*words[:2], str(int(words[2]) - layers.start), *words[3:]))] = tensor
        elif words[1] != "layers":
            is_here = part == 0 if words[0] == "embedding" else part == num_parts - 1
            found |= {name: tensor} if is_here else {}
    return found


def _own_experts(tensors: Tensors, rank: int, num_ranks: int) -> Tensors:
    numbers = [int(name.split(".")[6]) for name in tensors if "local_experts" in name]
    num_local = (1 + max(numbers, default=-1)) // num_ranks
    found = {}
    for name, tensor in tensors.items():
        words = name.split(".")
        if "local_experts" not in name:
            found[name] = tensor
        elif int(words[6]) // num_local == rank:
            words[6] = str(int(words[6]) % num_local)
            found[".".join(words)] = tensor
    return found


def _experts_as(tensors: Tensors, module: str) -> Tensors:
    if module == "sequential":
        return tensors
    found = {name: tensor for name, tensor in tensors.items() if "local_experts" not in name}
    matrices: dict[tuple[str, str], list[Tensor]] = {}
    for name, tensor in tensors.items():
        if "local_experts" in name:
            layer, _, rest = name.partition(".local_experts.")
            matrices.setdefault((layer, rest.split(".")[1]), []).append(tensor)
    for (layer, matrix), experts in matrices.items():
        if module == "transformer engine":
            found |= {f"{layer}.{matrix}.weight{number}": tensor for number, tensor in enumerate(experts)}
            continue
        in_memory = torch.stack([tensor.T for tensor in experts])  # n matrices [in, out], whatever the shape says
        shape = (experts[0].shape[1], -1) if matrix == "linear_fc1" else (-1, experts[0].shape[0])
        found[f"{layer}.weight{matrix[-1]}"] = in_memory.reshape(shape)
    return found


def save_ranks(folder: Path, ranks: dict[tuple[int, ...], Any], args: argparse.Namespace) -> Path:
    """Megatron's torch format: iter_0000005 with a folder for each rank, and the tracker file beside it."""
    for (tensor, stage, expert), chunks in ranks.items():
        name = f"mp_rank_{tensor:02d}"
        name += f"_{stage:03d}" if args.pipeline_model_parallel_size > 1 else ""
        name += f"_{expert:03d}" if args.expert_model_parallel_size > 1 else ""
        states = [{**chunk, "moe_relu_l1_reg_coeff": torch.tensor(0.25), "x._extra_state": None} for chunk in chunks]
        models = {"model": states[0]} if len(states) == 1 else {f"model{i}": state for i, state in enumerate(states)}
        content = {
            "args": args, "checkpoint_version": 3.0, "iteration": 5, **models,
            "rng_state": [{"random_rng_state": random.getstate(), "np_rng_state": np.random.default_rng(0)}],
        }  # fmt: skip
        (folder / "iter_0000005" / name).mkdir(parents=True)
        torch.save(content, folder / "iter_0000005" / name / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    return folder


def save_torch_dist(folder: Path, whole: Tensors, args: argparse.Namespace) -> Path:
    """The torch_dist format that ReMoE's scripts use: experts stacked, layers too where they are all alike."""
    stored = _experts_stacked(whole)
    is_mixed = any(".mlp.linear_fc1.weight" in name for name in stored)
    stored = stored if is_mixed else _layers_stacked(stored)
    stored["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.ones(3)
    folder.mkdir(parents=True, exist_ok=True)
    dcp.save(dict(stored), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    content = {"args": args, "iteration": 5, "model": {"moe_relu_l1_reg_coeff": torch.tensor(0.25)}}
    torch.save(content, folder / "common.pt")
    return folder


def _layers_stacked(tensors: Tensors) -> Tensors:
    found: Tensors = {}
    layers: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        words = name.split(".")
        if words[1] == "layers":
            layers.setdefault(".".join(words[:2] + words[3:]), []).append(tensor)
        else:
            found[name] = tensor
    return found | {name: torch.stack(parts) for name, parts in layers.items()}


def _experts_stacked(whole: Tensors) -> Tensors:
    found: Tensors = {}
    experts: dict[str, list[Tensor]] = {}
    for name, tensor in whole.items():
        layer, is_expert, rest = name.partition(".local_experts.")
        if is_expert:
            experts.setdefault(f"{layer}.experts.{rest.partition('.')[2]}", []).append(tensor)
        else:
            found[name] = tensor
    return found | {name: torch.stack(matrices) for name, matrices in experts.items()}
