"""The processes arranged in rows and columns: who shares which parameters."""

from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from remoe.distributed.config import ParallelConfig


class Meshes(NamedTuple):
    """Neighbouring ranks share sequences or experts, then a copy of the parameters; copies are farthest apart."""

    data: DeviceMesh
    """[replicate, shard], or [shard] without copies: parameters that every data rank needs."""
    expert: DeviceMesh | None
    """[expert]: ranks that share the experts of a layer; None: every rank has all."""
    expert_data: DeviceMesh | None
    """[replicate, outer] or [outer]: ranks with the same experts."""
    sequence: DeviceMesh | None
    """[sequence]: ranks that share the tokens of a sequence; None: nobody does."""
    heads_data: DeviceMesh | None
    """[replicate, shard] or [shard]: ranks with the same heads, where those are shared (tensor parallel)."""

    @classmethod
    def build(cls, parallel: ParallelConfig, device: torch.device) -> "Meshes":
        """Arrange the processes of a resolved section. All of them must call this."""
        copies, ranks = parallel.data_replicate, parallel.shared_by
        data = _outer_of(_arrange(device, copies, ranks, 1, "alone"), copies)
        expert, expert_data, sequence, heads_data = None, None, None, None
        if parallel.expert > 1:
            whole = _arrange(device, copies, ranks // parallel.expert, parallel.expert, "expert")
            expert, expert_data = whole["expert"], _outer_of(whole, copies)
        if parallel.sequence_ranks > 1:
            whole = _arrange(device, copies, parallel.shards, parallel.sequence_ranks, "sequence")
            sequence, heads_data = whole["sequence"], _outer_of(whole, copies)
        return cls(data, expert, expert_data, sequence, heads_data if parallel.tensor > 1 else None)


def _arrange(device: torch.device, copies: int, outer: int, inner: int, name: str) -> DeviceMesh:
    return init_device_mesh(device.type, (copies, outer, inner), mesh_dim_names=("replicate", "outer", name))


def _outer_of(mesh: DeviceMesh, copies: int) -> DeviceMesh:
    return mesh["replicate", "outer"] if copies > 1 else mesh["outer"]
