"""Sequences whose tokens are shared by ranks: only attention exchanges anything, in one of two ways.

Context parallel: each rank projects its own tokens, then gives each rank all tokens of some heads, and back (as
DeepSpeed-Ulysses does). Tensor parallel: each rank has the weights of some heads, gathers all tokens before them, and
sums the outputs over ranks after them (Megatron's sequence parallelism). All else is data parallel over tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from remoe.model.sequence import WholeSequence, own_columns

Exchange = Callable[[Tensor, dist.ProcessGroup], Tensor]


class SharedSequence(WholeSequence):
    """Rank q of s has the q-th s-th of each sequence."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.index, self.num_ranks = group.rank(), group.size()

    def columns(self, length: int) -> slice:
        return own_columns(length, self.index, self.num_ranks)

    def _exchanged(self, tensor: Tensor, there: Exchange, back: Exchange) -> Tensor:
        return _Exchanged.apply(tensor, there, back, self.group)  # pyright: ignore[reportReturnType]


class ContextParallel(SharedSequence):
    """Exchanges tokens for heads around attention; parameters stay whole."""

    def tokens_to_heads(self, projected_BSX: Tensor) -> Tensor:
        return self._exchanged(projected_BSX, _tokens_to_heads, _heads_to_tokens)

    def heads_to_tokens(self, mixed_BSX: Tensor) -> Tensor:
        return self._exchanged(mixed_BSX, _heads_to_tokens, _tokens_to_heads)


class TensorParallel(SharedSequence):
    """Gathers tokens before the heads and sums over heads after them; each rank has the weights of its own heads."""

    def gather_tokens(self, hidden_BSH: Tensor) -> Tensor:
        return self._exchanged(hidden_BSH, _gather, _scatter_sum)

    def scatter_tokens(self, hidden_BSH: Tensor) -> Tensor:
        return self._exchanged(hidden_BSH, _scatter_sum, _gather)


def share_heads(attention: nn.Module, mesh: DeviceMesh) -> None:
    """Keep this rank's heads of an attention module, in place: rows of the inner projections, columns of the outer."""
    for name in ("q_proj", "k_proj", "v_proj"):
        _share(getattr(attention, name), mesh, dim=0)
    _share(attention.o_proj, mesh, dim=1)  # pyright: ignore[reportArgumentType]


def _share(linear: nn.Module, mesh: DeviceMesh, dim: int) -> None:
    weight: Any = linear.weight
    own = weight.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
    shared = DTensor.from_local(own, mesh, [Shard(dim)], run_check=False)
    linear.weight = nn.Parameter(shared, requires_grad=weight.requires_grad)


class _Exchanged(torch.autograd.Function):
    """A tensor after an exchange among the ranks; its gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, there: Exchange, back: Exchange, group: dist.ProcessGroup) -> Tensor:
        ctx.back, ctx.group = back, group
        return there(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        return ctx.back(grad, ctx.group), None, None, None


def _tokens_to_heads(projected: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, S/s, X] of all heads to [B, S, X/s] of own heads."""
    by_rank = torch.stack(projected.chunk(group.size(), dim=-1))  # [s, B, S/s, X/s]: whose heads
    received = torch.empty_like(by_rank)
    dist.all_to_all_single(received, by_rank, group=group)  # [s, B, S/s, X/s]: whose tokens
    return torch.cat(received.unbind(), dim=1)


def _heads_to_tokens(mixed: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, S, X/s] of own heads to [B, S/s, X] of all heads."""
    by_rank = torch.stack(mixed.chunk(group.size(), dim=1))  # whose tokens
    received = torch.empty_like(by_rank)
    dist.all_to_all_single(received, by_rank, group=group)  # whose heads
    return torch.cat(received.unbind(), dim=-1)


def _gather(hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, S/s, H] to [B, S, H]. Each rank's gradient is of all tokens; on the way back they add up."""
    everyone = hidden.new_empty((group.size() * hidden.shape[0], *hidden.shape[1:]))
    dist.all_gather_into_tensor(everyone, hidden.contiguous(), group=group)
    return torch.cat(everyone.chunk(group.size()), dim=1)


def _scatter_sum(hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of [B, S, H], of which each keeps its own tokens [B, S/s, H]."""
    by_rank = torch.cat(hidden.chunk(group.size(), dim=1))  # [s*B, S/s, H]
    own = by_rank.new_empty((hidden.shape[0], *by_rank.shape[1:]))
    dist.reduce_scatter_tensor(own, by_rank, group=group)
    return own
