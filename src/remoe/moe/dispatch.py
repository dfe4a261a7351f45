"""Which row goes to which expert: the active (token, expert) pairs sorted by expert."""

from typing import NamedTuple

from torch import Tensor

from remoe.kernels.dispatch_lists import dispatch_lists
from remoe.moe.routing import Merging, Routing


class DispatchPlan(NamedTuple):
    """The N active pairs of a routing map as rows, sorted by expert, then token. All int64.

    With a capacity N is at least the number of pairs, and entries past the last pair mean nothing.
    """

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
    overflow: Tensor | None = None
    """With a capacity, 0-dim bool: there were more pairs, and some were left out."""

    @property
    def lists(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The five lists, without the flag: what the ops take."""
        return self.token_N, self.pair_N, self.row_N, self.expert_offsets, self.token_offsets


def plan(routing_map_TE: Tensor, capacity: int | None = None) -> DispatchPlan:
    """Sort the active pairs of a bool routing map by expert; tokens and experts without pairs are fine.

    Without a capacity a GPU waits for the number of pairs; with one nothing waits, and `overflow` tells whether the
    pairs were more. A CPU lists all pairs in either case, and sets `overflow` all the same.
    """
    *lists, num_pairs = dispatch_lists(routing_map_TE, capacity)
    return DispatchPlan(*lists, overflow=None if capacity is None else num_pairs > capacity)


def plan_of(routing: Routing, capacity: int | None = None) -> DispatchPlan | Merging:
    """What a routing's experts need: the rows of each, or how they are merged."""
    return plan(routing.routing_map_TE, capacity) if routing.merging is None else routing.merging
