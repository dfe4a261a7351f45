"""The norm of gradients that are spread over ranks: one number on the wire, the same bits on every rank."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_shared_gradients(parameters: Iterable[nn.Parameter], max_norm: float, copies: int) -> Tensor:
    """Scale gradients down to `max_norm` (0: leave them) and return their norm before that: 0-dim.

    Every rank holds a part of each gradient, and `copies` ranks hold the same part. Layouts may differ between
    parameters, which is why DTensor's own norm, one collective a layout, is not used.
    """
    own = [_own(parameter.grad) for parameter in parameters if parameter.grad is not None]
    square = nn.utils.get_total_norm(own).square() / copies
    dist.all_reduce(square)
    norm = square.sqrt()
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grads_with_norm_
        torch._foreach_mul_(own, scale)
    return norm


def _own(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
