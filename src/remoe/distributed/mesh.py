"""The processes arranged in rows and columns: who shares which parameters."""

from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from remoe.distributed.config import ParallelConfig


class Meshes(NamedTuple):
    """Neighbouring ranks share experts, then a copy's parameters; copies of the model are farthest apart."""

    data: DeviceMesh
    """[replicate, shard], or [shard] without copies: parameters that every data rank needs."""
    expert: DeviceMesh | None
    """[expert]: ranks that share the experts of a layer; None: every rank has all."""
    expert_data: DeviceMesh | None
    """[replicate, outer] or [outer]: ranks with the same experts."""

    @classmethod
    def build(cls, parallel: ParallelConfig, device: torch.device) -> "Meshes":
        """Arrange the processes of a resolved section. All of them must call this."""
        copies, shards, experts = parallel.data_replicate, parallel.shards, parallel.expert
        data = init_device_mesh(device.type, (copies, shards), mesh_dim_names=("replicate", "shard"))
        data = data if copies > 1 else data["shard"]
        if experts == 1:
            return cls(data, None, None)
        names = ("replicate", "outer", "expert")
        whole = init_device_mesh(device.type, (copies, shards // experts, experts), mesh_dim_names=names)
        return cls(data, whole["expert"], whole["replicate", "outer"] if copies > 1 else whole["outer"])
