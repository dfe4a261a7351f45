"""remoe::grouped_linear: rows sorted by expert, each through its expert's W x + b, as one op with its gradients.

The plain path on every device: one matrix product an expert. On a GPU that waits for the counts.
"""

# pyright: reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
# (torch.library has no precise types)

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor


@torch.library.custom_op("remoe::grouped_linear", mutates_args=())
def grouped_linear(rows_NI: Tensor, weight: Tensor, bias: Tensor, expert_offsets: Tensor) -> Tensor:
    """W_e x + b_e for each row [N, O]; weight is [E, O, I], bias [E, O], all of one dtype."""
    out_NO = rows_NI.new_empty((rows_NI.shape[0], weight.shape[1]))
    for expert, rows in _groups(expert_offsets):
        torch.addmm(bias[expert], rows_NI[rows], weight[expert].t(), out=out_NO[rows])
    return out_NO


@torch.library.custom_op("remoe::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(
    grad_NO: Tensor, rows_NI: Tensor, weight: Tensor, expert_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows, the weight and the bias; 0 for experts without rows."""
    grad_rows_NI, grad_weight = torch.empty_like(rows_NI), torch.zeros_like(weight)
    grad_bias = weight.new_zeros(weight.shape[:2])
    for expert, rows in _groups(expert_offsets):
        torch.mm(grad_NO[rows], weight[expert], out=grad_rows_NI[rows])
        torch.mm(grad_NO[rows].t(), rows_NI[rows], out=grad_weight[expert])
        grad_bias[expert] = grad_NO[rows].sum(0)
    return grad_rows_NI, grad_weight, grad_bias


@grouped_linear.register_fake
def _(rows_NI: Tensor, weight: Tensor, bias: Tensor, expert_offsets: Tensor) -> Tensor:
    return rows_NI.new_empty((rows_NI.shape[0], weight.shape[1]))


@grouped_linear_backward.register_fake
def _(grad_NO: Tensor, rows_NI: Tensor, weight: Tensor, expert_offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(rows_NI), torch.empty_like(weight), weight.new_empty(weight.shape[:2])


def _groups(expert_offsets: Tensor) -> Iterator[tuple[int, slice]]:
    bounds = cast(list[int], expert_offsets.tolist())
    for expert, (first, last) in enumerate(pairwise(bounds)):
        if first < last:
            yield expert, slice(first, last)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    rows_NI, weight, _, expert_offsets = inputs
    ctx.save_for_backward(rows_NI, weight, expert_offsets)


def _backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
    return (*grouped_linear_backward(grad_NO.contiguous(), *ctx.saved_tensors), None)


grouped_linear.register_autograd(_backward, setup_context=_keep)
