"""One matrix product an expert over its own rows: the path of CPUs, and of GPUs without a grouped product.

Rows are gathered once, written in place wherever a buffer is free, and each expert's weight gradient goes straight
into its slice (slicing one stacked parameter inside autograd would fill a full-size gradient an expert).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.kernels.expert_mlp import huge_pages
from remoe.kernels.expert_mlp.combine import gather_sum
from remoe.kernels.expert_mlp.sums import Sums, added

Lists = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
CHUNKS = False


def forward(
    hidden_TH: Tensor, weights_TE: Tensor, gate_up_proj: Tensor, down_proj: Tensor, lists: Lists, row_cap: int = 0
) -> tuple[Tensor, Tensor]:
    """See remoe::expert_mlp."""
    bounds, (token_N, pair_N, row_N, token_offsets) = _without_tail(lists)
    x_NH = hidden_TH.index_select(0, token_N)
    up_N2F = x_NH.new_empty((lists[0].shape[0], gate_up_proj.shape[1]))
    y_NH = torch.empty_like(x_NH)
    for expert, rows in _segments(bounds):
        torch.mm(x_NH[rows], gate_up_proj[expert].t(), out=up_N2F[rows])
        gate, up = up_N2F[rows].chunk(2, dim=-1)
        torch.mm(F.silu(gate).mul_(up), down_proj[expert].t(), out=y_NH[rows])
    weights_N = weights_TE.flatten().index_select(0, pair_N)
    return gather_sum(y_NH, row_N, token_offsets, weights_N).to(hidden_TH.dtype), up_N2F


def backward(
    grad_out_TH: Tensor, up_N2F: Tensor, hidden_TH: Tensor, weights_TE: Tensor,
    gate_up_proj: Tensor, down_proj: Tensor, lists: Lists, row_cap: int = 0, sums: Sums | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See remoe::expert_mlp_backward. The gate's gradient is <dA, a> with a recomputed, so that y is never kept."""
    bounds, (token_N, pair_N, row_N, token_offsets) = _without_tail(lists)
    x_NH = hidden_TH.index_select(0, token_N)
    grad_y_NH = grad_out_TH.index_select(0, token_N)
    weights_N = weights_TE.flatten().index_select(0, pair_N)
    scale_N1 = weights_N[:, None].to(x_NH.dtype)
    scaled_x_NH, scaled_grad_y_NH = x_NH * scale_N1, grad_y_NH * scale_N1  # H is narrower than F: weigh here
    grad_weights_N, grad_x_NH = torch.empty_like(weights_N), torch.empty_like(x_NH)
    grad_gate_up, grad_down = (_with_idle_zeroed(weight, lists[3]) for weight in (gate_up_proj, down_proj))
    for expert, rows in _segments(bounds):
        grad_act = grad_y_NH[rows] @ down_proj[expert]
        act, grad_up = _swiglu_backward(up_N2F[rows], grad_act)
        grad_weights_N[rows] = _row_dots(grad_act, act).to(weights_N.dtype)
        torch.mm(scaled_grad_y_NH[rows].t(), act, out=grad_down[expert])
        torch.mm(grad_up.t(), scaled_x_NH[rows], out=grad_gate_up[expert])
        torch.mm(grad_up, gate_up_proj[expert], out=grad_x_NH[rows])
    grad_hidden_TH = gather_sum(grad_x_NH, row_N, token_offsets, weights_N).to(hidden_TH.dtype)
    grad_weights_TE = torch.zeros_like(weights_TE)
    grad_weights_TE.view(-1).index_copy_(0, pair_N, grad_weights_N)
    return grad_hidden_TH, grad_weights_TE, *added(sums, grad_gate_up, grad_down)


def _without_tail(lists: Lists) -> tuple[list[int], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Where experts begin, and the lists without entries past the last pair; on a GPU this waits for the counts."""
    token_N, pair_N, row_N, expert_offsets, token_offsets = lists
    bounds = cast(list[int], expert_offsets.tolist())  # pyright: ignore[reportUnknownMemberType]
    end = bounds[-1]
    return bounds, (token_N[:end], pair_N[:end], row_N[:end], token_offsets)


def _segments(bounds: list[int]) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, with their place."""
    for expert, (first, last) in enumerate(pairwise(bounds)):
        if first < last:
            yield expert, slice(first, last)


def _with_idle_zeroed(weight: Tensor, expert_offsets: Tensor) -> Tensor:
    """A fresh buffer for a weight's gradient: 0 for experts without rows, the others still to be written."""
    grad = huge_pages.empty_like(weight)
    grad[expert_offsets.diff() == 0] = 0
    return grad


def _swiglu_backward(up_n2F: Tensor, grad_act: Tensor) -> tuple[Tensor, Tensor]:
    """From pre-activations and dA: the activation a and the gradient of the pre-activations, both before the gate."""
    gate, up = up_n2F.chunk(2, dim=-1)
    grad_up_n2F = torch.empty_like(up_n2F)
    grad_gate, grad_up = grad_up_n2F.chunk(2, dim=-1)
    silu = F.silu(gate)
    torch.mul(grad_act, silu, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_act * up, gate, grad_input=grad_gate)
    return silu.mul_(up), grad_up_n2F


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=-1, dtype=torch.promote_types(a.dtype, torch.float32))
