"""The norm of gradients that are spread over ranks: one number on the wire, the same bits on every rank."""

from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from remoe.distributed.shared_parameters import own_gradient


@torch.no_grad()
def clip_shared_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, copies: int, elsewhere: Collection[nn.Parameter] = ()
) -> Tensor:
    """Scale gradients down to `max_norm` (0: leave them) and return their norm before that: 0-dim.

    Every rank holds a part of each gradient, and `copies` ranks hold the same part. `elsewhere`: parameters that other
    ranks count. Layouts may differ between parameters, which is why DTensor's own norm, one collective a layout, is
    not used.
    """
    own = {parameter: own_gradient(parameter) for parameter in parameters if parameter.grad is not None}
    counted = [gradient for parameter, gradient in own.items() if parameter not in elsewhere]
    square = nn.utils.get_total_norm(counted).square() / copies
    dist.all_reduce(square)
    norm = square.sqrt()
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grads_with_norm_
        torch._foreach_mul_(list(own.values()), scale)
    return norm
