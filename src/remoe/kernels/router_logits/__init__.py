"""remoe::router_logits: a linear router's logits in fp32, from tokens in half precision that it reads as they are and
weights in fp32.

A library's fp32 product would need the tokens widened first, and returns their gradient in fp32: twice the memory to
write, keep and read, for products with a handful of columns.
"""

# pyright: reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
# (torch.library has no precise types)

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from remoe.kernels.router_logits import reference

_HAS_TRITON = find_spec("triton") is not None and torch.version.hip is None  # TF32 parts are NVIDIA's
_HALF = (torch.bfloat16, torch.float16)
_FEWEST_TOKENS, _MOST_EXPERTS = 1024, 64
"""With fewer tokens the kernel has too few programs; with more experts products take the time, not reading."""


def is_worth_it(hidden_TH: Tensor, weight_EH: Tensor) -> bool:
    """Whether the op computes X W^T faster than a library: many tokens in half precision and few experts, on a GPU."""
    if not (_HAS_TRITON and hidden_TH.is_cuda and hidden_TH.dtype in _HALF and weight_EH.dtype == torch.float32):
        return False
    if hasattr(hidden_TH, "to_local") or hasattr(weight_EH, "to_local"):  # a DTensor
        return False
    return hidden_TH.shape[0] >= _FEWEST_TOKENS and weight_EH.shape[0] <= _MOST_EXPERTS


@torch.library.custom_op("remoe::router_logits", mutates_args=())
def router_logits(hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """X W^T [T, E] in fp32."""
    return reference.router_logits(hidden_TH, weight_EH)


@torch.library.custom_op("remoe::router_logits_backward", mutates_args=())
def router_logits_backward(grad_TE: Tensor, hidden_TH: Tensor, weight_EH: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of X, in its dtype, and of W, in fp32."""
    return reference.gradients(grad_TE, hidden_TH, weight_EH)


@router_logits.register_kernel("cuda")
def _(hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
    from remoe.kernels.router_logits.kernel import router_logits_triton  # triton is an extra: first needed on a GPU

    return router_logits_triton(hidden_TH.contiguous(), weight_EH.contiguous())


@router_logits_backward.register_kernel("cuda")
def _(grad_TE: Tensor, hidden_TH: Tensor, weight_EH: Tensor) -> tuple[Tensor, Tensor]:
    from remoe.kernels.router_logits.kernel import gradients_triton

    return gradients_triton(grad_TE.contiguous(), hidden_TH.contiguous(), weight_EH.contiguous())


@router_logits.register_fake
def _(hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
    return weight_EH.new_empty((hidden_TH.shape[0], weight_EH.shape[0]))


@router_logits_backward.register_fake
def _(grad_TE: Tensor, hidden_TH: Tensor, weight_EH: Tensor) -> tuple[Tensor, Tensor]:
    return hidden_TH.new_empty(hidden_TH.shape), weight_EH.new_empty(weight_EH.shape)


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
    return router_logits_backward(grad_TE, *ctx.saved_tensors)


router_logits.register_autograd(_backward, setup_context=_keep_inputs)
