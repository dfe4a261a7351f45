"""Sharing only what the optimizer needs (ZeRO stage 1): each rank holds the model, and a part of its fp32 weights.

Gradients are summed, each rank getting its part, and weights gathered once a step, so that a forward and backward pass
is that of one process but for what it counts, and for tokens where ranks share experts or sequences. The parts are
DTensors of the same names and shapes as FSDP's: checkpoints, clipping and the optimizer do not tell them apart.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from remoe.distributed.collectives import all_gather, reduce_scatter
from remoe.distributed.config import ParallelConfig
from remoe.distributed.expert_parallel import share_experts
from remoe.distributed.mesh import Meshes
from remoe.distributed.shard import REDUCE, shard_dim_on, share_sequences
from remoe.moe import MoE


class Share(NamedTuple):
    """How ranks that hold a parameter whole share its fp32 weights and optimizer state."""

    mesh: DeviceMesh
    """[replicate, shard], or [shard] without copies; with expert parallelism [.., shard, expert] for experts."""
    shard_index: int
    """Which dimension of the mesh `shard` is; before it, there may be one of copies."""
    dim: Shard
    """Where the parameter is cut."""
    expert: tuple[Placement, ...]
    """Where experts are cut, so that each rank computes with its own ones; empty for other parameters."""
    reduce_dtype: torch.dtype

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Of the parts as a whole."""
        return (Replicate(),) * self.shard_index + (self.dim,) + self.expert

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks whose parts make up what each of them computes with."""
        return self.mesh.get_group(self.shard_index)

    def is_plain(self, held: Tensor) -> bool:
        """Whether the parts lie in memory one after the other, equally long, or are one."""
        ranks = self.group.size()
        return ranks == 1 or (self.dim.dim == 0 and held.shape[0] % ranks == 0)

    def part(self, held: Tensor) -> DTensor:
        """This rank's part of a parameter, in fp32."""
        return self._from(held.float(), Replicate()).redistribute(placements=self.placements)

    def summed(self, gradient: Tensor) -> DTensor:
        """This rank's part of the sum of all ranks' gradients."""
        return self._from(gradient, Partial()).redistribute(placements=self.placements)

    def whole(self, part: DTensor) -> Tensor:
        """What each rank computes with, of all ranks' parts."""
        held = (Replicate(),) * (self.shard_index + 1) + self.expert
        return part.redistribute(placements=held).to_local()

    def _from(self, held: Tensor, each: Placement) -> DTensor:
        placements = (each,) * (self.shard_index + 1) + self.expert
        return DTensor.from_local(held, self.mesh, placements, run_check=False)


class Shared(NamedTuple):
    """A parameter that ranks hold whole, and this rank's part of its fp32 weights. Where no other rank holds it, the
    part may be the same memory, and its gradient that of the sum.
    """

    held: nn.Parameter
    master: nn.Parameter
    """A DTensor."""
    share: Share


def share_optimizer(model: nn.Module, meshes: Meshes, parallel: ParallelConfig) -> dict[nn.Parameter, Share]:
    """Leave a ReMoEForCausalLM whole, but for experts that ranks share, in place; how its parameters will be shared."""
    decoder: Any = model.model
    share_sequences(decoder, meshes, parallel)
    experts: dict[nn.Parameter, Share] = {}
    if meshes.expert is not None and meshes.every_expert is not None:
        for layer in decoder.present_layers():
            if isinstance(layer.mlp, MoE):
                _keep_own_experts(layer.mlp, meshes.expert, parallel)
                experts |= _shares(layer.mlp.experts.parameters(), meshes.every_expert, parallel, (Shard(0),))
    others = (parameter for parameter in model.parameters() if parameter not in experts)
    return experts | _shares(others, meshes.data, parallel)


@torch.no_grad()
def sum_gradients(gradients: Iterable[tuple[Shared, Tensor]]) -> None:
    """Give each master its part of the sum of all ranks' gradients, in fp32. All ranks must call this alike."""
    started = [(parameter.master, *_started_sum(parameter.share, gradient)) for parameter, gradient in gradients]
    for master, own, work in started:
        if work is not None:
            work.wait()
        master.grad = own.float()


@torch.no_grad()
def gather_weights(parameters: Iterable[Shared]) -> None:
    """Let every rank compute with the masters of all, rounded as it holds them. All ranks must call this alike."""
    started = []
    for held, master, share in parameters:
        part = cast(DTensor, master.detach())
        if not share.is_plain(held):
            held.copy_(share.whole(cast(DTensor, part.to(held.dtype))))
        elif share.group.size() == 1:
            held.copy_(part.to_local())
        else:
            own = part.to_local().to(held.dtype)
            started.append((all_gather(held.data, own, group=share.group, async_op=True), own))
    for work, _ in started:
        work.wait()


def _started_sum(share: Share, gradient: Tensor) -> tuple[DTensor, dist.Work | None]:
    """This rank's part of a sum, which is there when the work is done."""
    if not share.is_plain(gradient):
        return share.summed(gradient.to(share.reduce_dtype)), None
    has_others = share.group.size() > 1 or share.shard_index > 0
    own, work = gradient.to(share.reduce_dtype) if has_others else gradient, None
    if share.group.size() > 1:
        gradient = own
        own = gradient.new_empty(gradient.shape[0] // share.group.size(), *gradient.shape[1:])
        work = reduce_scatter(own, gradient, group=share.group, async_op=True)
    if share.shard_index > 0:
        if work is not None:
            work.wait()
        work = dist.all_reduce(own, group=share.mesh.get_group(0), async_op=True)
    return DTensor.from_local(own, share.mesh, share.placements, run_check=False), work


def _keep_own_experts(layer: MoE, mesh: DeviceMesh, parallel: ParallelConfig) -> None:
    share_experts(layer, mesh, parallel.expert_rows * layer.config.routed_top_k)
    for name, parameter in list(layer.experts.named_parameters()):
        own = cast(DTensor, parameter).to_local().detach()
        setattr(layer.experts, name, nn.Parameter(own, requires_grad=parameter.requires_grad))


def _shares(
    parameters: Iterable[nn.Parameter], mesh: DeviceMesh, parallel: ParallelConfig, expert: tuple[Placement, ...] = ()
) -> dict[nn.Parameter, Share]:
    shard_index = mesh.ndim - len(expert) - 1
    choose = shard_dim_on(mesh.size(shard_index), taken=[0] if expert else [])
    reduce_dtype = REDUCE[parallel.reduce]
    return {parameter: Share(mesh, shard_index, choose(parameter), expert, reduce_dtype) for parameter in parameters}
