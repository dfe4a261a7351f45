"""Cross-entropy of each row of logits, and its gradient over them, in one kernel: two reads, one write."""

# pyright: basic
# (triton has no types)

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_V = 4096


def softmax_gradient_triton_(logits_CV: Tensor, labels_C: Tensor, with_gradients: bool) -> Tensor:
    """See reference.softmax_gradient_."""
    num_rows, num_columns = logits_CV.shape
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    losses_C = torch.empty(num_rows, dtype=wide, device=logits_CV.device)
    block_v = min(_BLOCK_V, triton.next_power_of_2(num_columns))
    constants = {"WITH_GRADIENTS": with_gradients, "BLOCK_V": block_v, "num_warps": 8}
    if num_rows:
        _softmax_gradient_kernel[(num_rows,)](
            logits_CV, labels_C, losses_C, logits_CV.stride(0), num_columns, **constants
        )
    return losses_C


@triton.jit
def _softmax_gradient_kernel(
    logits_ptr, labels_ptr, losses_ptr, row_stride, num_columns, WITH_GRADIENTS: tl.constexpr, BLOCK_V: tl.constexpr
):
    """One row a program; logits in, gradients out, at the same place."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    label = tl.load(labels_ptr + row)
    is_counted = label >= 0
    column = tl.arange(0, BLOCK_V)
    # read before the sums below, which all warps wait for: afterwards another warp may have overwritten it
    logit_of_label = tl.load(logits_ptr + tl.where(is_counted, label, 0)).to(tl.float32)
    top, total = -float("inf"), 0.0
    for first in range(0, num_columns, BLOCK_V):
        inside = first + column < num_columns
        logit = tl.load(logits_ptr + first + column, mask=inside, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(logit, axis=0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logit - new_top), axis=0)
        top = new_top
    log_sum = top + tl.log(total)
    tl.store(losses_ptr + row, tl.where(is_counted, log_sum - logit_of_label, 0.0))
    if WITH_GRADIENTS:
        for first in range(0, num_columns, BLOCK_V):
            inside = first + column < num_columns
            logit = tl.load(logits_ptr + first + column, mask=inside, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(logit - log_sum) - tl.where(first + column == label, 1.0, 0.0)
            tl.store(logits_ptr + first + column, tl.where(is_counted, gradient, 0.0), mask=inside)
