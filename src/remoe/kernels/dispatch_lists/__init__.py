"""remoe::dispatch_lists: from a routing map to the row lists that dispatch and combine read."""

# pyright: reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
# (torch.library has no precise types)

from typing import cast

import torch
from torch import Tensor

from remoe.kernels.dispatch_lists import reference

Lists = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("remoe::dispatch_lists", mutates_args=())
def dispatch_lists(routing_map_TE: Tensor, capacity: int | None = None) -> Lists:
    """Sort the N active (token, expert) pairs by expert, then token; all int64, no gradient.

    Returns token_N (the token of each row), pair_N (token * E + expert of each row), row_N (the rows again, but token
    by token), expert_offsets [E+1] and token_offsets [T+1] (where each expert's and each token's rows begin), and the
    number of active pairs, 0-dim.

    On a GPU with a capacity the lists have that length, whatever the map holds, and nothing waits: entries past the
    last pair are unwritten, and pairs past the capacity are left out (offsets end there). Elsewhere N is exact.
    """
    return reference.dispatch_lists(routing_map_TE)


@dispatch_lists.register_kernel("cuda")
def _(routing_map_TE: Tensor, capacity: int | None = None) -> Lists:
    from remoe.kernels.dispatch_lists.kernel import dispatch_lists_triton  # triton is an extra: first needed on a GPU

    return dispatch_lists_triton(routing_map_TE, capacity)


@dispatch_lists.register_fake
def _(routing_map_TE: Tensor, capacity: int | None = None) -> Lists:
    num_tokens, num_experts = routing_map_TE.shape
    if capacity is None or routing_map_TE.device.type != "cuda":
        capacity = cast(int, torch.library.get_ctx().new_dynamic_size())
    num_rows = capacity

    def empty(*shape: int) -> Tensor:
        return routing_map_TE.new_empty(shape, dtype=torch.int64)

    return empty(num_rows), empty(num_rows), empty(num_rows), empty(num_experts + 1), empty(num_tokens + 1), empty()
