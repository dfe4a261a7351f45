"""The processes arranged in rows and columns: who shares which parameters."""

from datetime import timedelta
from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from remoe.distributed.config import ParallelConfig


class Meshes(NamedTuple):
    """Neighbouring ranks share sequences or experts, then a copy of the parameters; then come the copies, and stages
    are farthest apart. All but `stages` are among the ranks of one stage.
    """

    data: DeviceMesh
    """[replicate, shard], or [shard] without copies: parameters that every data rank needs."""
    expert: DeviceMesh | None
    """[expert]: ranks that share the experts of a layer; None: every rank has all."""
    expert_data: DeviceMesh | None
    """[replicate, outer] or [outer]: ranks with the same experts."""
    every_expert: DeviceMesh | None
    """[replicate, outer, expert] or [outer, expert]: both of them."""
    sequence: DeviceMesh | None
    """[sequence]: ranks that share the tokens of a sequence; None: nobody does."""
    heads_data: DeviceMesh | None
    """[replicate, shard] or [shard]: ranks with the same heads, where those are shared (tensor parallel)."""
    stages: DeviceMesh | None
    """[stage, within]: first the ranks that pass micro-batches on to each other, then those with the same layers."""

    @classmethod
    def build(cls, parallel: ParallelConfig, device: torch.device) -> "Meshes":
        """Arrange the processes of a resolved section. All of them must call this."""
        copies, ranks = parallel.data_replicate, parallel.shared_by
        data = _outer_of(_arrange(parallel, device, ranks, 1, "alone"), copies)
        expert, expert_data, every_expert, sequence, heads_data, stages = None, None, None, None, None, None
        if parallel.expert > 1:
            whole = _arrange(parallel, device, ranks // parallel.expert, parallel.expert, "expert")
            expert, expert_data, every_expert = (
                whole["expert"],
                _outer_of(whole, copies),
                _outer_of(whole, copies, "expert"),
            )
        if parallel.sequence_ranks > 1:
            whole = _arrange(parallel, device, parallel.shards, parallel.sequence_ranks, "sequence")
            sequence, heads_data = whole["sequence"], _outer_of(whole, copies)
        if parallel.pipeline > 1:
            stages = _mesh(parallel, device, stage=parallel.pipeline, within=copies * ranks)
        heads_data = heads_data if parallel.tensor > 1 else None
        return cls(data, expert, expert_data, every_expert, sequence, heads_data, stages)


def _arrange(parallel: ParallelConfig, device: torch.device, outer: int, inner: int, name: str) -> DeviceMesh:
    stages = {"stage": parallel.pipeline} if parallel.pipeline > 1 else {}
    return _mesh(parallel, device, **stages, replicate=parallel.data_replicate, outer=outer, **{name: inner})


def _mesh(parallel: ParallelConfig, device: torch.device, **sizes: int) -> DeviceMesh:
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    for group in mesh.get_all_groups():  # torch gives them times of its own, up to half an hour
        _set_pg_timeout(timedelta(seconds=parallel.timeout), group)
    return mesh


def _outer_of(mesh: DeviceMesh, copies: int, *inner: str) -> DeviceMesh:
    return mesh["replicate", "outer", *inner] if copies > 1 else mesh["outer", *inner]
