"""Expert parallelism: each rank owns some experts of a layer and works for the tokens of all ranks that need them.

A token goes to 0 to R ranks, once to each whatever the number of experts it uses there, and one sum comes back from
each. A rank that sends or gets nothing takes part in the exchange all the same, so that nobody waits for it.

How many rows go where is known only once the routers have decided. Exactly as many are sent where the ranks first tell
each other, for which the host waits. With a `Capacity` nothing waits: every rank sends every other equally many rows,
some of them empty, and a step with more is void (`training.ahead`).

Memory is bounded: where some rank would send or get more rows than a budget, all go through their tokens in parts,
which are exchanged and computed again in the backward pass. That is the dense start of ReLU training, or an unlucky
batch.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from remoe.distributed.collectives import all_gather, exchange_evenly, known_to_ops
from remoe.kernels.rows import combine_rows, dispatch_rows
from remoe.moe import MoE, Routing
from remoe.moe.dispatch import DispatchPlan, plan
from remoe.moe.layer import Capacity

Function = TypeVar("Function", bound=Callable[..., Any])


class Splits(NamedTuple):
    """How many rows go to each rank of the group, and how many come from each."""

    sent: list[int]
    received: list[int]

    def back(self) -> "Splits":
        """The way back."""
        return Splits(self.received, self.sent)


class Announced(NamedTuple):
    """What one exchange of a layer comes to."""

    splits: Splits
    num_pairs: int
    """Active (token, expert) pairs that come here."""
    is_too_much: bool
    """Whether the rows of some rank are above the budget; the same on all."""
    needs: Tensor
    """The most rows from one rank to another, and the most pairs at one [2]."""


def _uncompiled(function: Function) -> Function:
    """The same function, at whose calls graphs end."""
    return cast(Function, torch.compiler.disable(function))


class ExpertExchange:
    """Runs a layer's experts over the tokens of all ranks of the group that own parts of them.

    `rows_per_token` is the budget: so many rows, times the mean number of tokens of a rank, may come to a rank or leave
    it at once.
    """

    def __init__(self, group: dist.ProcessGroup, rows_per_token: float = math.inf) -> None:
        self.group = group
        self.index, self.num_ranks = group.rank(), group.size()
        self.rows_per_token = rows_per_token
        self.capacity: Capacity | None = None
        """None: exact. Ranks with a capacity have equally many tokens."""
        self.group_name = known_to_ops(group)

    def __call__(self, experts: nn.Module, hidden_TH: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        """The sum of each token's experts, weighted by its gates, wherever they are [T, H]; see moe.layer.Exchange."""
        if self.capacity is not None:
            return self._padded(experts, hidden_TH, routing, self._rows(self.capacity, len(hidden_TH)))
        out_TH, needs = self._waiting(experts, hidden_TH, routing)
        return out_TH, routing._replace(needs=needs)

    def has_room(self, capacity: Capacity, num_tokens: int) -> bool:
        """Whether so many rows, empty ones among them, are within the budget."""
        return self._rows(capacity, num_tokens) * self.num_ranks <= self.rows_per_token * num_tokens

    def _rows(self, capacity: Capacity, num_tokens: int) -> int:
        """From each rank to each: no more than tokens, and one where there is need of none."""
        return max(1, min(capacity.rows, num_tokens))

    @_uncompiled
    def _waiting(self, experts: nn.Module, hidden_TH: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """The output, and what a capacity would have had to hold."""
        inputs = (hidden_TH, routing.routing_map_TE, routing.weights_TE)
        announced = self._announce(routing.routing_map_TE)
        if not announced.is_too_much:
            return self._exchanged(experts, *inputs, announced), announced.needs
        # even with all of a token's rows at one rank, parts of T / this number hold the budget
        num_parts = math.ceil(self.num_ranks / self.rows_per_token)
        run = partial(checkpoint, self._part, experts, use_reentrant=False)
        parts = zip(*(values.tensor_split(num_parts) for values in inputs), strict=True)
        return torch.cat([run(*part) for part in parts]), announced.needs

    def _part(self, experts: nn.Module, hidden_TH: Tensor, map_TE: Tensor, weights_TE: Tensor) -> Tensor:
        return self._exchanged(experts, hidden_TH, map_TE, weights_TE, self._announce(map_TE))

    def _exchanged(
        self, experts: nn.Module, hidden_TH: Tensor, map_TE: Tensor, weights_TE: Tensor, announced: Announced
    ) -> Tensor:
        """Rows there, experts, sums back [T, H].

        R: ranks, e: experts of one, M: (token, rank) pairs sent, N: those received.
        """
        by_rank = plan(self._map_of_ranks(map_TE), sum(announced.splits.sent))
        lists = (by_rank.token_N, by_rank.row_N, by_rank.token_offsets)
        hidden_MH = dispatch_rows(hidden_TH, *lists)
        gates_M2e = self._gates(map_TE, weights_TE).index_select(0, by_rank.pair_N)
        map_Ne, weights_Ne = _opened(exchange_rows(gates_M2e, announced.splits, self.group))
        hidden_NH = exchange_rows(hidden_MH, announced.splits, self.group)
        out_NH = experts(hidden_NH, plan(map_Ne, announced.num_pairs), weights_Ne)
        return combine_rows(exchange_rows(out_NH, announced.splits.back(), self.group), *lists)

    def _padded(self, experts: nn.Module, hidden_TH: Tensor, routing: Routing, rows: int) -> tuple[Tensor, Routing]:
        """The same with so many rows from each rank to each: M = N = R * rows, and those left over open no expert."""
        assert self.capacity is not None, "the caller has looked"
        map_TE, pairs = routing.routing_map_TE, self.capacity.pairs
        map_TR = self._map_of_ranks(map_TE)
        by_rank = plan(map_TR, rows * self.num_ranks)
        pair_M, is_row_M, slot_N = _slots(by_rank, self.num_ranks, rows)
        lists = (pair_M // self.num_ranks, slot_N, by_rank.token_offsets)
        hidden_MH = dispatch_rows(hidden_TH, *lists)
        gates_M2e = self._gates(map_TE, routing.weights_TE).index_select(0, pair_M) * is_row_M[:, None]
        map_Ne, weights_Ne = _opened(exchange_evenly(gates_M2e, self.group_name))
        here = plan(map_Ne, min(pairs, map_Ne.numel()))
        out_NH = experts(exchange_evenly(hidden_MH, self.group_name), here, weights_Ne)
        out_TH = combine_rows(exchange_evenly(out_NH, self.group_name), *lists)
        needs = torch.stack((map_TR.sum(0).max(), map_Ne.sum()))
        overflow = (needs[0] > rows) | (needs[1] > pairs)
        return out_TH, routing._replace(overflow=overflow, needs=needs)

    def _map_of_ranks(self, map_TE: Tensor) -> Tensor:
        """Which rank has an expert for which token [T, R]."""
        return map_TE.unflatten(1, (self.num_ranks, -1)).any(2)

    def _gates(self, map_TE: Tensor, weights_TE: Tensor) -> Tensor:
        """Weights and map of a (token, rank) pair's experts, side by side in one dtype: [T*R, 2e]."""
        values = (weights_TE, map_TE.to(weights_TE.dtype))
        return torch.cat([each.unflatten(1, (self.num_ranks, -1)) for each in values], 2).flatten(0, 1)

    def _announce(self, map_TE: Tensor) -> Announced:
        """Tell all ranks how many rows and active pairs go where: the one place of a layer that waits for a GPU."""
        map_TRe = map_TE.unflatten(1, (self.num_ranks, -1))
        pairs_R, rows_R = map_TRe.sum((0, 2)), map_TRe.any(2).sum(0)
        tokens_R = torch.full_like(rows_R, len(map_TE))
        sent_3R = torch.stack((rows_R, pairs_R, tokens_R))
        everyone = sent_3R.new_empty(3 * self.num_ranks, self.num_ranks)
        all_gather(everyone, sent_3R, group=self.group)
        rows_RR, pairs_RR, tokens_RR = everyone.unflatten(0, (-1, 3)).unbind(1)  # from each rank to each
        most_R = torch.maximum(rows_RR.sum(0), rows_RR.sum(1))
        sent, received, pairs, most, tokens = torch.stack(
            (rows_R, rows_RR[:, self.index], pairs_RR[:, self.index], most_R, tokens_RR[:, 0])
        ).tolist()
        is_too_much = max(most) * self.num_ranks > self.rows_per_token * sum(tokens)
        needs = torch.stack((rows_RR.max(), pairs_RR.sum(0).max()))
        return Announced(Splits(sent, received), sum(pairs), is_too_much, needs)


def _opened(gates_N2e: Tensor) -> tuple[Tensor, Tensor]:
    """The map and the weights of rows that have come."""
    weights_Ne, map_Ne = gates_N2e.chunk(2, 1)
    return map_Ne.detach() > 0, weights_Ne


def _slots(by_rank: DispatchPlan, num_ranks: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where rows, sorted by rank, lie if each of R ranks has room for c of them: the pair of each place, or 0 where a
    place is empty, whether it is not, and the place of each entry of `row_N`. What there is no room for lies anywhere.
    """
    begin_R, end_R = by_rank.expert_offsets[:-1], by_rank.expert_offsets[1:]
    row_Rc = begin_R[:, None] + torch.arange(rows, device=begin_R.device)
    is_row_Rc = row_Rc < end_R[:, None]
    pair_Rc = F.pad(by_rank.pair_N, (0, 1))[row_Rc.where(is_row_Rc, 0)].where(is_row_Rc, 0)
    rank_N = torch.bucketize(by_rank.row_N, end_R, right=True).clamp(max=num_ranks - 1)
    slot_N = rank_N * rows + by_rank.row_N - begin_R[rank_N]
    return pair_Rc.flatten(), is_row_Rc.flatten(), slot_N.clamp(0, num_ranks * rows - 1)


def share_experts(layer: MoE, mesh: DeviceMesh, rows_per_token: float = math.inf) -> None:
    """Keep this rank's experts of a layer, in place, and exchange tokens with the other ranks of the mesh; see
    ExpertExchange for the budget.

    The parameters become DTensors, split over experts: a checkpoint knows which part each rank has.
    """
    index, ranks = mesh.get_local_rank(), mesh.size()
    for name, parameter in list(layer.experts.named_parameters()):
        own = parameter.detach().chunk(ranks)[index].clone()
        shared = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
        setattr(layer.experts, name, nn.Parameter(shared, requires_grad=parameter.requires_grad))
    layer.exchange = ExpertExchange(mesh.get_group(), rows_per_token)


def exchange_rows(rows_MX: Tensor, splits: Splits, group: dist.ProcessGroup) -> Tensor:
    """Send `splits.sent` rows to each rank in turn; the rows that came, in the order of ranks [N, X]."""
    return _Exchange.apply(rows_MX, splits, group)  # pyright: ignore[reportReturnType]


class _Exchange(torch.autograd.Function):
    """all_to_all_single of rows; the gradients travel back the same way."""

    @staticmethod
    def forward(ctx: Any, rows_MX: Tensor, splits: Splits, group: dist.ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = splits, group
        return _all_to_all(rows_MX, splits, group)

    @staticmethod
    def backward(ctx: Any, grad_NX: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        return _all_to_all(grad_NX, ctx.splits.back(), ctx.group), None, None


def _all_to_all(rows: Tensor, splits: Splits, group: dist.ProcessGroup) -> Tensor:
    received = rows.new_empty((sum(splits.received), rows.shape[1]))
    dist.all_to_all_single(received, rows.contiguous(), splits.received, splits.sent, group=group)
    return received
