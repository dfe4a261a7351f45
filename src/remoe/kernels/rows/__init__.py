"""remoe::dispatch_rows and remoe::combine_rows: tokens to expert rows and back, each the other's gradient.

Both are gathers (the sum runs over lists, not through atomics), so forward and backward give the same bits each run.
"""

# pyright: reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
# (torch.library has no precise types)

from typing import Any

import torch
from torch import Tensor

from remoe.kernels.expert_mlp.backends import TRITON_DTYPES
from remoe.kernels.expert_mlp.combine import gather_sum


@torch.library.custom_op("remoe::dispatch_rows", mutates_args=())
def dispatch_rows(hidden_TH: Tensor, token_N: Tensor, row_N: Tensor, token_offsets: Tensor) -> Tensor:
    """A copy of its token for each row [N, H]. The lists are those of `dispatch_lists`."""
    return hidden_TH.index_select(0, token_N)


@torch.library.custom_op("remoe::combine_rows", mutates_args=())
def combine_rows(rows_NH: Tensor, token_N: Tensor, row_N: Tensor, token_offsets: Tensor) -> Tensor:
    """The sum of each token's rows [T, H], in the rows' dtype; 0 for a token without rows."""
    return gather_sum(rows_NH, row_N, token_offsets)


@combine_rows.register_kernel("cuda")
def _(rows_NH: Tensor, token_N: Tensor, row_N: Tensor, token_offsets: Tensor) -> Tensor:
    if rows_NH.dtype not in TRITON_DTYPES:
        return gather_sum(rows_NH, row_N, token_offsets)
    from remoe.kernels.rows.kernel import combine_rows_triton  # triton is an extra: first needed on a GPU

    return combine_rows_triton(rows_NH.contiguous(), row_N, token_offsets)


@dispatch_rows.register_fake
def _(hidden_TH: Tensor, token_N: Tensor, row_N: Tensor, token_offsets: Tensor) -> Tensor:
    return hidden_TH.new_empty((token_N.shape[0], hidden_TH.shape[1]))


@combine_rows.register_fake
def _(rows_NH: Tensor, token_N: Tensor, row_N: Tensor, token_offsets: Tensor) -> Tensor:
    return rows_NH.new_empty((token_offsets.shape[0] - 1, rows_NH.shape[1]))


def _keep_lists(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _dispatch_backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor | None, ...]:
    return combine_rows(grad_NH.contiguous(), *ctx.saved_tensors), None, None, None


def _combine_backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
    return dispatch_rows(grad_TH.contiguous(), *ctx.saved_tensors), None, None, None


dispatch_rows.register_autograd(_dispatch_backward, setup_context=_keep_lists)
combine_rows.register_autograd(_combine_backward, setup_context=_keep_lists)
