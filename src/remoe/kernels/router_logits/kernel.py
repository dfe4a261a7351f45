"""A router's logits and their gradients: products with so few columns that reading the tokens is what takes time.

Each product is one of three products of TF32 parts, summed in fp32: a half-precision token is exact in TF32, a weight
is in two parts up to 2^-22.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD = {"BLOCK_T": 64, "BLOCK_H": 64, "num_warps": 4, "num_stages": 4}
BACKWARD = {"BLOCK_T": 128, "BLOCK_H": 64, "num_warps": 4, "num_stages": 1}


@triton.jit
def logits_kernel(x_ptr, w_ptr, out_ptr, T, H, E, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr):
    """out[t, e] = sum over h of x[t, h] w[e, h]."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    sum_TE = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + t[:, None] * H + h[None, :], mask=(t[:, None] < T) & (h[None, :] < H), other=0.0)
        w = tl.load(w_ptr + e[None, :] * H + h[:, None], mask=(e[None, :] < E) & (h[:, None] < H), other=0.0)
        sum_TE = tl.dot(x.to(tl.float32), w.to(tl.float32), sum_TE, input_precision="tf32x3")
    tl.store(out_ptr + t[:, None] * E + e[None, :], sum_TE, mask=(t[:, None] < T) & (e[None, :] < E))


@triton.jit
def gradients_kernel(
    grad_ptr, x_ptr, w_ptr, grad_x_ptr, grad_w_ptr, T, H, E,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """grad_x[t, h] of a block, and what its tokens add to grad_w[e, h]."""
    block = tl.program_id(0).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    e = tl.arange(0, BLOCK_E)
    inside_TH = (t[:, None] < T) & (h[None, :] < H)
    inside_EH = (e[:, None] < E) & (h[None, :] < H)
    x = tl.load(x_ptr + t[:, None] * H + h[None, :], mask=inside_TH, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + t[:, None] * E + e[None, :], mask=(t[:, None] < T) & (e[None, :] < E), other=0.0)
    w = tl.load(w_ptr + e[:, None] * H + h[None, :], mask=inside_EH, other=0.0).to(tl.float32)
    grad_x = tl.dot(grad, w, input_precision="tf32x3")
    tl.store(grad_x_ptr + t[:, None] * H + h[None, :], grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside_TH)
    grad_w = tl.dot(tl.trans(grad), x, input_precision="tf32x3")
    tl.store(grad_w_ptr + (block * E + e[:, None]) * H + h[None, :], grad_w, mask=inside_EH)


def router_logits_triton(hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """logits = X W^T [T, E] in fp32."""
    (num_tokens, hidden_size), num_experts = hidden_TH.shape, len(weight_EH)
    out_TE = hidden_TH.new_empty((num_tokens, num_experts), dtype=torch.float32)
    if num_tokens:
        logits_kernel[(triton.cdiv(num_tokens, FORWARD["BLOCK_T"]),)](
            hidden_TH, weight_EH, out_TE, num_tokens, hidden_size, num_experts, BLOCK_E=_columns(num_experts), **FORWARD
        )
    return out_TE


def gradients_triton(grad_TE: Tensor, hidden_TH: Tensor, weight_EH: Tensor) -> tuple[Tensor, Tensor]:
    """Those of X, in its dtype, and of W, in fp32: sums over blocks of tokens, then over the blocks, in their order."""
    (num_tokens, hidden_size), num_experts = hidden_TH.shape, len(weight_EH)
    blocks = triton.cdiv(num_tokens, BACKWARD["BLOCK_T"]), triton.cdiv(hidden_size, BACKWARD["BLOCK_H"])
    grad_TH = torch.empty_like(hidden_TH)
    parts_BEH = hidden_TH.new_empty((blocks[0], num_experts, hidden_size), dtype=torch.float32)
    if num_tokens:
        gradients_kernel[blocks](
            grad_TE, hidden_TH, weight_EH, grad_TH, parts_BEH, num_tokens, hidden_size, num_experts,
            BLOCK_E=_columns(num_experts), **BACKWARD,
        )  # fmt: skip
    return grad_TH, parts_BEH.sum(0)


def _columns(num_experts: int) -> int:
    return max(16, triton.next_power_of_2(num_experts))
