"""FSDP2 over a decoder: which parameters are gathered together, in which dtype, and how gradients are summed.

The units are attention and experts (or the dense MLP): their only output is the hidden state. A layer's routing must
not leave a unit: the losses read it first in the backward pass, which would gather every layer at once. Everything
small (embedding, norms, routers, the shared cell, the head) is in the root, in fp32, gathered once a step.
"""

import warnings
from collections.abc import Callable, Collection
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from remoe.distributed.config import ParallelConfig
from remoe.distributed.expert_parallel import share_experts
from remoe.distributed.mesh import Meshes
from remoe.distributed.sequence_parallel import ContextParallel, TensorParallel, share_heads
from remoe.errors import ConfigError
from remoe.model.sequence import WHOLE, WholeSequence
from remoe.moe import MoE

REDUCE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shard_model(
    model: nn.Module, meshes: Meshes, parallel: ParallelConfig, param_dtype: torch.dtype | None
) -> None:  # fmt: skip
    """Spread the parameters of a ReMoEForCausalLM, or a part of one, over the ranks, in place; names stay as they are.

    A gradient is then the sum over ranks, not the mean: each rank's loss is its share of the batch's.
    """
    # FSDP warns of units whose output is a view, for in-place sums would lose its hook; the model has none
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")
    units = Units(parallel, param_dtype)
    inner: list[FSDPModule] = []
    decoder: Any = model.model
    share_sequences(decoder, meshes, parallel)
    for layer in decoder.present_layers():
        inner += [
            units.add(*_attention(layer.self_attn, meshes)),
            units.add(*_mlp(layer.mlp, meshes, parallel.expert_rows)),
        ]
    for unit, following in pairwise(inner):  # else a layer that waits for its rows would hold up the next gather
        unit.set_modules_to_forward_prefetch([following])
    units.param_dtype = None
    units.add(model, meshes.data)
    model.register_forward_hook(_forget_gathered)


class Units:
    """Makes FSDP units, all of one kind."""

    def __init__(self, parallel: ParallelConfig, param_dtype: torch.dtype | None) -> None:
        self.parallel = parallel
        self.param_dtype = param_dtype

    def add(self, module: nn.Module, mesh: DeviceMesh) -> FSDPModule:
        """Make `module`, less what is in units already, a unit over `mesh`."""
        policy = MixedPrecisionPolicy(
            param_dtype=self.param_dtype, reduce_dtype=REDUCE[self.parallel.reduce], cast_forward_inputs=False
        )
        reshard = None if self.parallel.reshard else False
        unit = fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=reshard,
            shard_placement_fn=shard_dim_on(mesh.size(-1)),
        )
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other, and by 1 nothing is divided twice
        return unit


def share_sequences(decoder: Any, meshes: Meshes, parallel: ParallelConfig) -> None:
    """Tell a decoder and its attention which ranks they share each sequence with."""
    decoder.sequence = _sequence(meshes, parallel)
    for layer in decoder.present_layers():
        layer.self_attn.sequence = decoder.sequence


def _sequence(meshes: Meshes, parallel: ParallelConfig) -> WholeSequence:
    if meshes.sequence is None:
        return WHOLE
    group = meshes.sequence.get_group()
    return TensorParallel(group) if parallel.tensor > 1 else ContextParallel(group)


def _attention(attention: nn.Module, meshes: Meshes) -> tuple[nn.Module, DeviceMesh]:
    if meshes.sequence is None or meshes.heads_data is None:
        return attention, meshes.data
    share_heads(attention, meshes.sequence)
    return attention, meshes.heads_data


def _mlp(mlp: nn.Module, meshes: Meshes, expert_rows: float) -> tuple[nn.Module, DeviceMesh]:
    if not isinstance(mlp, MoE):
        return mlp, meshes.data
    if meshes.expert is None or meshes.expert_data is None:
        return mlp.experts, meshes.data
    share_experts(mlp, meshes.expert, expert_rows * mlp.config.routed_top_k)
    return mlp.experts, meshes.expert_data


def shard_dim_on(ranks: int, taken: Collection[int] = ()) -> Callable[[nn.Parameter], Shard]:
    """Where a parameter is cut: the first dimension, or a later one that suits the number of ranks better.

    Experts are cut within if their number is no multiple of it. Dimensions that are cut already are left alone: a
    DTensor's own, or those that are `taken`.
    """

    def dim(parameter: nn.Parameter) -> Shard:
        own = [place.dim for place in parameter.placements] if isinstance(parameter, DTensor) else []  # pyright: ignore
        free = [dim for dim in range(parameter.ndim) if dim not in own and dim not in taken]
        even = [dim for dim in free if parameter.shape[dim] % ranks == 0]
        if 0 in free and (parameter.ndim < 3 or 0 in even or not even):
            return Shard(0)  # torch can cut only the first dimension unevenly
        if even:
            return Shard(even[0])
        raise ConfigError(
            f"a parameter of shape {list(parameter.shape)} cannot be shared by {ranks} more ranks, which must divide "
            "one of its dimensions after the first; change the sizes of parallel"
        )

    return dim


def _forget_gathered(model: nn.Module, inputs: Any, output: Any) -> None:
    """After a forward pass without a backward pass the root, which a backward pass frees, would stay gathered."""
    if not torch.is_grad_enabled():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
