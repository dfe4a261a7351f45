"""Collectives over one tensor, which torch 2.13 renamed; and one that a compiled graph can hold."""

# pyright: reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
# (torch.library has no precise types)

from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""(output, input, group=..., async_op=...): the ranks' inputs, one after the other."""
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
"""(output, input, group=..., async_op=...): this rank's piece of the sum of the ranks' inputs."""
_GROUPS: WeakValueDictionary[str, dist.ProcessGroup] = WeakValueDictionary()
"""Those that ops name, for an op takes no group; torch's own lookup by name is private. Weak, for a group must end
before the interpreter does: gloo's threads need Python until then.
"""


def known_to_ops(group: dist.ProcessGroup) -> str:
    """A name by which `exchange_evenly` finds the group, as long as the caller keeps it."""
    _GROUPS[group.group_name] = group
    return group.group_name


@torch.library.custom_op("remoe::exchange_evenly", mutates_args=())
def exchange_evenly(rows_NX: Tensor, group: str) -> Tensor:
    """Send each rank of the group an equal share of the rows; those that came, in the order of ranks [N, X]."""
    received_NX = torch.empty_like(rows_NX, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received_NX, rows_NX.contiguous(), group=_GROUPS[group])
    return received_NX


@exchange_evenly.register_fake
def _(rows_NX: Tensor, group: str) -> Tensor:
    return torch.empty_like(rows_NX, memory_format=torch.contiguous_format)


def _keep_group(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


def _exchange_back(ctx: Any, grad_NX: Tensor) -> tuple[Tensor, None]:
    return exchange_evenly(grad_NX, ctx.group), None


exchange_evenly.register_autograd(_exchange_back, setup_context=_keep_group)
