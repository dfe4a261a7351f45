"""remoe::linear_cross_entropy: output head and cross-entropy as one op that never holds all logits."""

# pyright: reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
# (torch.library has no precise types)

from typing import Any

import torch
from torch import Tensor

from remoe.kernels.linear_cross_entropy import reference

NO_LABEL = reference.NO_LABEL
CHUNK_BYTES = 2**30
"""Of logits at a time: enough for the products' full speed, little beside the activations of a large micro-batch."""
_ROWS_MULTIPLE = 128

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("remoe::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_T: Tensor, with_gradients: bool = True
) -> Result:
    """Return the sum of the cross-entropies of hidden W^T + bias (0-dim), each one of them [T], and three gradients.

    Losses are fp32, 0 where the label is NO_LABEL. hidden_TH, weight_VH and bias_V have one dtype; logits too, as the
    products of an autocast region. The logits are made, turned into their own gradient and used up in chunks of rows in
    the forward pass; the last three outputs, empty without gradients, are for the backward pass. Only the sum has one.
    """
    size = rows_at_a_time(len(labels_T), weight_VH.shape[0] * weight_VH.element_size())
    chunks = Chunks(hidden_TH, weight_VH, bias_V, labels_T, size)
    losses_T, gradients = chunks.run(with_gradients)
    return losses_T.sum(), losses_T, *gradients


def rows_at_a_time(num_rows: int, row_bytes: int) -> int:
    """Rows of a chunk, of which there are as few as CHUNK_BYTES allow, and none is much smaller than the others."""
    blocks = max(1, -(-num_rows // _ROWS_MULTIPLE))
    most = max(1, CHUNK_BYTES // (_ROWS_MULTIPLE * row_bytes))
    num_chunks = -(-blocks // most)
    return -(-blocks // num_chunks) * _ROWS_MULTIPLE


class Chunks:
    """The rows of one call, `size` at a time."""

    def __init__(
        self, hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_T: Tensor, size: int
    ) -> None:  # fmt: skip
        self.hidden_TH, self.weight_VH, self.bias_V, self.labels_T = hidden_TH, weight_VH, bias_V, labels_T
        self.size = size

    def run(self, with_gradients: bool) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Losses [T] and the gradients of their sum: of hidden, weight and bias; sums over chunks are fp32 or wider."""
        losses_T = self._new(self.labels_T.shape)
        grad_hidden_TH = torch.empty_like(self.hidden_TH) if with_gradients else self.hidden_TH.new_empty(0)
        grad_weight_VH = self._new(self.weight_VH.shape if with_gradients else (0,))
        grad_bias_V = self._new(self.bias_V.shape if with_gradients and self.bias_V is not None else (0,))
        for first in range(0, len(self.labels_T), self.size):
            rows = slice(first, first + self.size)
            logits_CV = torch.nn.functional.linear(self.hidden_TH[rows], self.weight_VH, self.bias_V)
            losses_T[rows] = softmax_gradient_(logits_CV, self.labels_T[rows], with_gradients)
            if with_gradients:
                torch.mm(logits_CV, self.weight_VH, out=grad_hidden_TH[rows])
                add_product_(grad_weight_VH, logits_CV.T, self.hidden_TH[rows])
                grad_bias_V += logits_CV.sum(0, dtype=grad_bias_V.dtype) if self.bias_V is not None else 0
            del logits_CV  # else the next chunk's are made beside them
        dtype = self.weight_VH.dtype
        return losses_T, (grad_hidden_TH, grad_weight_VH.to(dtype), grad_bias_V.to(dtype))

    def _new(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        wide = torch.promote_types(self.weight_VH.dtype, torch.float32)
        return torch.zeros(shape, dtype=wide, device=self.weight_VH.device)


def add_product_(sum_VH: Tensor, left_VC: Tensor, right_CH: Tensor) -> None:
    """sum += left right; of half-precision factors on a GPU by the product itself, which then rounds nothing."""
    if left_VC.is_cuda and left_VC.dtype != sum_VH.dtype:
        torch.addmm(sum_VH, left_VC, right_CH, out_dtype=sum_VH.dtype, out=sum_VH)
    else:
        sum_VH += left_VC @ right_CH


def softmax_gradient_(logits_CV: Tensor, labels_C: Tensor, with_gradients: bool) -> Tensor:
    """Cross-entropy of each row [C]; with gradients the logits become those of the sum, in place."""
    if not logits_CV.is_cuda:
        return reference.softmax_gradient_(logits_CV, labels_C, with_gradients)
    from remoe.kernels.linear_cross_entropy.kernel import softmax_gradient_triton_  # triton is an extra

    return softmax_gradient_triton_(logits_CV, labels_C, with_gradients)


@linear_cross_entropy.register_fake
def _(
    hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_T: Tensor, with_gradients: bool = True
) -> Result:
    wide = torch.promote_types(weight_VH.dtype, torch.float32)
    losses_T = labels_T.new_empty(labels_T.shape, dtype=wide)
    given = (hidden_TH, weight_VH, bias_V)
    shapes = [tensor.shape if with_gradients and tensor is not None else (0,) for tensor in given]
    gradients = [hidden_TH.new_empty(shape) for shape in shapes]
    return losses_T.new_empty(()), losses_T, gradients[0], gradients[1], gradients[2]


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.has_bias = inputs[2] is not None
    ctx.save_for_backward(*output[2:])


def _backward(ctx: Any, grad_sum: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_sum is None:
        return (None,) * 5
    grad_hidden_TH, grad_weight_VH, grad_bias_V = (gradient * grad_sum for gradient in ctx.saved_tensors)
    return grad_hidden_TH, grad_weight_VH, grad_bias_V if ctx.has_bias else None, None, None


linear_cross_entropy.register_autograd(_backward, setup_context=_keep_gradients)
