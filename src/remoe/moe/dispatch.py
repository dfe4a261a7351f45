"""Which row goes to which expert: the active (token, expert) pairs sorted by expert."""

from typing import NamedTuple

from torch import Tensor

from remoe.kernels.dispatch_lists import dispatch_lists
from remoe.moe.routing import Merging, Routing


class DispatchPlan(NamedTuple):
    """The N active pairs of a routing map as rows, sorted by expert, then token. All int64."""

    token_N: Tensor
    """The token of each row."""
    pair_N: Tensor
    """token * E + expert of each row: where its gate lies in a flattened weights_TE."""
    row_N: Tensor
    """The rows token by token: what combine sums."""
    expert_offsets: Tensor
    """[E+1]: expert e's rows are expert_offsets[e] to expert_offsets[e+1]."""
    token_offsets: Tensor
    """[T+1]: token t's entries in row_N are token_offsets[t] to token_offsets[t+1]."""


def plan(routing_map_TE: Tensor) -> DispatchPlan:
    """Sort the active pairs of a bool routing map by expert; tokens and experts without pairs are fine."""
    return DispatchPlan(*dispatch_lists(routing_map_TE))


def plan_of(routing: Routing) -> DispatchPlan | Merging:
    """What a routing's experts need: the rows of each, or how they are merged."""
    return plan(routing.routing_map_TE) if routing.merging is None else routing.merging
