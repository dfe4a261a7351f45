"""Collectives over one tensor, which torch 2.13 renamed."""

import torch.distributed as dist

all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""(output, input, group=..., async_op=...): the ranks' inputs, one after the other."""
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
"""(output, input, group=..., async_op=...): this rank's piece of the sum of the ranks' inputs."""
