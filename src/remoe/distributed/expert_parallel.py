"""Expert parallelism: each rank owns some experts of a layer and works for the tokens of all ranks that need them.

A token goes to 0 to R ranks, once to each whatever the number of experts it uses there, and one sum comes back from
each. A rank that sends or gets nothing takes part in the exchange all the same, so that nobody waits for it.

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
from torch.utils.checkpoint import checkpoint

from remoe.distributed.collectives import all_gather
from remoe.kernels.rows import combine_rows, dispatch_rows
from remoe.moe import MoE, Routing
from remoe.moe.dispatch import plan
from remoe.moe.experts import compute_dtype

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

    def __call__(self, experts: nn.Module, hidden_TH: Tensor, routing: Routing) -> Tensor:
        """The sum of each token's experts, weighted by its gates, wherever they are [T, H]."""
        return self._waiting(experts, hidden_TH, routing)

    @_uncompiled
    def _waiting(self, experts: nn.Module, hidden_TH: Tensor, routing: Routing) -> Tensor:
        inputs = (hidden_TH, routing.routing_map_TE, routing.weights_TE)
        announced = self._announce(routing.routing_map_TE)
        if not announced.is_too_much:
            return self._exchanged(experts, *inputs, announced)
        # even with all of a token's rows at one rank, parts of T / this number hold the budget
        num_parts = math.ceil(self.num_ranks / self.rows_per_token)
        run = partial(checkpoint, self._part, experts, use_reentrant=False)
        parts = zip(*(values.tensor_split(num_parts) for values in inputs), strict=True)
        return torch.cat([run(*part) for part in parts])

    def _part(self, experts: nn.Module, hidden_TH: Tensor, map_TE: Tensor, weights_TE: Tensor) -> Tensor:
        return self._exchanged(experts, hidden_TH, map_TE, weights_TE, self._announce(map_TE))

    def _exchanged(
        self, experts: nn.Module, hidden_TH: Tensor, map_TE: Tensor, weights_TE: Tensor, announced: Announced
    ) -> Tensor:
        """Rows there, experts, sums back [T, H].

        R: ranks, e: experts of one, M: (token, rank) pairs sent, N: those received.
        """
        map_Pe, weights_Pe = self._by_rank(map_TE), self._by_rank(weights_TE)
        map_TR = map_Pe.any(1).view(-1, self.num_ranks)
        splits, num_pairs, _ = announced
        by_rank = plan(map_TR, sum(splits.sent))
        lists = (by_rank.token_N, by_rank.row_N, by_rank.token_offsets)
        hidden_MH = dispatch_rows(hidden_TH.to(compute_dtype(hidden_TH)), *lists)
        map_Me = map_Pe.index_select(0, by_rank.pair_N).to(torch.uint8)
        map_Ne = exchange_rows(map_Me, splits, self.group).bool()
        weights_Ne = exchange_rows(weights_Pe.index_select(0, by_rank.pair_N), splits, self.group)
        hidden_NH = exchange_rows(hidden_MH, splits, self.group)
        out_NH = experts(hidden_NH, plan(map_Ne, num_pairs), weights_Ne)
        return combine_rows(exchange_rows(out_NH, splits.back(), self.group), *lists)

    def _by_rank(self, values_TE: Tensor) -> Tensor:
        """Rows P = (token, rank) with the experts of that rank: [T*R, e]."""
        return values_TE.reshape(-1, values_TE.shape[1] // self.num_ranks)

    def _announce(self, map_TE: Tensor) -> Announced:
        """Tell all ranks how many rows and active pairs go where: the one place of a layer that waits for a GPU."""
        map_Pe = self._by_rank(map_TE)
        pairs_R = map_Pe.sum(1).view(-1, self.num_ranks).sum(0)
        rows_R = map_Pe.any(1).view(-1, self.num_ranks).sum(0)
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
        return Announced(Splits(sent, received), sum(pairs), is_too_much)


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
