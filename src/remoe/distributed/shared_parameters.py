"""Parameters that several stages of a pipeline hold whole: the gradient of each is the sum over the stages.

All their holders see the same sum, bit for bit, and so stay equal.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Holders(NamedTuple):
    """Parameters, and the stages that hold them; their number in this group tells the first one."""

    parameters: Sequence[nn.Parameter]
    group: dist.ProcessGroup


@torch.no_grad()
def sum_shared_gradients(shared: Iterable[Holders]) -> None:
    """Replace the gradients by their sums, once a step. A stage that does not use a parameter adds 0."""
    for parameters, group in shared:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        own = [own_gradient(parameter) for parameter in parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in own])
        dist.all_reduce(flat, group=group)
        summed = flat.split([gradient.numel() for gradient in own])
        torch._foreach_copy_(own, [part.view_as(gradient) for part, gradient in zip(summed, own, strict=True)])


def counted_elsewhere(shared: Iterable[Holders]) -> set[nn.Parameter]:
    """Those whose first holder is another stage: a sum over all parameters of all stages must leave them out."""
    return {parameter for parameters, group in shared if group.rank() > 0 for parameter in parameters}


def own_gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a parameter's gradient."""
    gradient = parameter.grad
    assert gradient is not None, "the parameter has a gradient"
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
