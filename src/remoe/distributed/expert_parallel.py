"""Expert parallelism: each rank owns some experts of a layer and works for the tokens of all ranks that need them.

A token goes to 0 to R ranks, once to each whatever the number of experts it uses there, and one sum comes back from
each. A rank that sends or gets nothing takes part in the exchange all the same, so that nobody waits for it.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from remoe.kernels.rows import combine_rows, dispatch_rows
from remoe.moe import MoE, Routing
from remoe.moe.dispatch import plan
from remoe.moe.experts import compute_dtype


class Splits(NamedTuple):
    """How many rows go to each rank of the group, and how many come from each."""

    sent: list[int]
    received: list[int]

    def back(self) -> "Splits":
        """The way back."""
        return Splits(self.received, self.sent)


class ExpertExchange:
    """Runs a layer's experts over the tokens of all ranks of the group that own parts of them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.num_ranks = group.size()

    def __call__(self, experts: nn.Module, hidden_TH: Tensor, routing: Routing) -> Tensor:
        """The sum of each token's experts, weighted by its gates, wherever they are [T, H].

        R: ranks, e: experts of one, M: (token, rank) pairs sent, N: those received.
        """
        map_Pe, weights_Pe = self._by_rank(routing.routing_map_TE), self._by_rank(routing.weights_TE)
        map_TR = map_Pe.any(1).view(-1, self.num_ranks)
        splits, num_pairs = self._announce(map_Pe, map_TR)
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

    def _announce(self, map_Pe: Tensor, map_TR: Tensor) -> tuple[Splits, int]:
        """Tell each rank how many rows and active pairs it will get; the splits, and the pairs that come here.

        The one place of a layer where a GPU is waited for.
        """
        pairs_R = map_Pe.sum(1).view(-1, self.num_ranks).sum(0)
        sent_R2 = torch.stack((map_TR.sum(0), pairs_R), dim=1)
        received_R2 = torch.empty_like(sent_R2)
        dist.all_to_all_single(received_R2, sent_R2, group=self.group)
        sent, received, pairs = torch.stack((sent_R2[:, 0], received_R2[:, 0], received_R2[:, 1])).tolist()
        return Splits(sent, received), sum(pairs)


def share_experts(layer: MoE, mesh: DeviceMesh) -> None:
    """Keep this rank's experts of a layer, in place, and exchange tokens with the other ranks of the mesh.

    The parameters become DTensors, split over experts: a checkpoint knows which part each rank has.
    """
    index, ranks = mesh.get_local_rank(), mesh.size()
    for name, parameter in list(layer.experts.named_parameters()):
        own = parameter.detach().chunk(ranks)[index].clone()
        shared = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
        setattr(layer.experts, name, nn.Parameter(shared, requires_grad=parameter.requires_grad))
    layer.exchange = ExpertExchange(mesh.get_group())


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
