"""A router's logits and their gradients: products with so few columns that reading the tokens is what takes time.

Products are three products of TF32 parts each, summed in fp32: a half-precision token is exact in TF32, a weight is in
two parts up to 2^-22. But gradients of bf16 tokens are products of bf16 parts, for which the tokens stay as they are:
three parts hold all 24 bits of a number, and two hold 16 where the sum is rounded to 8.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD = {"BLOCK_T": 64, "BLOCK_H": 64, "num_warps": 4, "num_stages": 4}
BACKWARD = {"BLOCK_T": 128, "BLOCK_H": 64, "WIDTH": 256, "num_warps": 4, "num_stages": 1}


@triton.jit
def router_logits_fwd_kernel(
    x_ptr, w_ptr, out_ptr, T, H, E, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr
):
    """out[t, e] = sum over h of x[t, h] w[e, h]."""
    t_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e_E = tl.arange(0, BLOCK_E)
    is_token_T1, is_expert_1E = t_T[:, None] < T, e_E[None, :] < E
    sum_TE = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for h in range(0, H, BLOCK_H):
        h_H = h + tl.arange(0, BLOCK_H)
        x_TH = tl.load(x_ptr + t_T[:, None] * H + h_H[None, :], mask=is_token_T1 & (h_H[None, :] < H), other=0.0)
        w_HE = tl.load(w_ptr + e_E[None, :] * H + h_H[:, None], mask=is_expert_1E & (h_H[:, None] < H), other=0.0)
        sum_TE = tl.dot(x_TH.to(tl.float32), w_HE, sum_TE, input_precision="tf32x3")
    tl.store(out_ptr + t_T[:, None] * E + e_E[None, :], sum_TE, mask=is_token_T1 & is_expert_1E)


@triton.jit
def router_logits_bwd_kernel(
    grad_ptr, x_ptr, w_ptr, grad_x_ptr, grad_w_ptr, T, H, E,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """grad_x[t, h] of a block of tokens and WIDTH numbers, and what its tokens add to grad_w[e, h]."""
    block = tl.program_id(0).to(tl.int64)
    t_T = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e_E = tl.arange(0, BLOCK_E)
    is_pair_TE = (t_T[:, None] < T) & (e_E[None, :] < E)
    grad_TE = tl.load(grad_ptr + t_T[:, None] * E + e_E[None, :], mask=is_pair_TE, other=0.0)
    dtype = x_ptr.dtype.element_ty
    for h in range(0, WIDTH, BLOCK_H):
        h_H = tl.program_id(1) * WIDTH + h + tl.arange(0, BLOCK_H)
        at_TH, inside_TH = t_T[:, None] * H + h_H[None, :], (t_T[:, None] < T) & (h_H[None, :] < H)
        inside_EH = (e_E[:, None] < E) & (h_H[None, :] < H)
        x_TH = tl.load(x_ptr + at_TH, mask=inside_TH, other=0.0)
        w_EH = tl.load(w_ptr + e_E[:, None] * H + h_H[None, :], mask=inside_EH, other=0.0)
        if dtype == tl.bfloat16:
            grad_1, grad_2, grad_3 = _bf16_parts(grad_TE)
            w_1, w_2, _ = _bf16_parts(w_EH)
            grad_x_TH = tl.dot(grad_1, w_1, tl.dot(grad_1, w_2, tl.dot(grad_2, w_1)))
            grad_w_EH = tl.dot(tl.trans(grad_2), x_TH, tl.dot(tl.trans(grad_3), x_TH))
            grad_w_EH = tl.dot(tl.trans(grad_1), x_TH, grad_w_EH)
        else:
            grad_x_TH = tl.dot(grad_TE, w_EH, input_precision="tf32x3")
            grad_w_EH = tl.dot(tl.trans(grad_TE), x_TH.to(tl.float32), input_precision="tf32x3")
        tl.store(grad_x_ptr + at_TH, grad_x_TH.to(dtype), mask=inside_TH)
        tl.store(grad_w_ptr + (block * E + e_E[:, None]) * H + h_H[None, :], grad_w_EH, mask=inside_EH)


@triton.jit
def _bf16_parts(x):
    """Three numbers whose sum is x."""
    first = x.to(tl.bfloat16)
    rest = x - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    return first, second, (rest - second.to(tl.float32)).to(tl.bfloat16)


def router_logits_triton(hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """logits = X W^T [T, E] in fp32."""
    (num_tokens, hidden_size), num_experts = hidden_TH.shape, len(weight_EH)
    out_TE = hidden_TH.new_empty((num_tokens, num_experts), dtype=torch.float32)
    if num_tokens:
        router_logits_fwd_kernel[(triton.cdiv(num_tokens, FORWARD["BLOCK_T"]),)](
            hidden_TH, weight_EH, out_TE, num_tokens, hidden_size, num_experts, BLOCK_E=_columns(num_experts), **FORWARD
        )
    return out_TE


def gradients_triton(grad_TE: Tensor, hidden_TH: Tensor, weight_EH: Tensor) -> tuple[Tensor, Tensor]:
    """Those of X, in its dtype, and of W, in fp32: sums over blocks of tokens, then over the blocks, in their order."""
    (num_tokens, hidden_size), num_experts = hidden_TH.shape, len(weight_EH)
    blocks = triton.cdiv(num_tokens, BACKWARD["BLOCK_T"]), triton.cdiv(hidden_size, BACKWARD["WIDTH"])
    grad_TH = torch.empty_like(hidden_TH)
    parts_BEH = hidden_TH.new_empty((blocks[0], num_experts, hidden_size), dtype=torch.float32)
    if num_tokens:
        router_logits_bwd_kernel[blocks](
            grad_TE, hidden_TH, weight_EH, grad_TH, parts_BEH, num_tokens, hidden_size, num_experts,
            BLOCK_E=_columns(num_experts), **BACKWARD,
        )  # fmt: skip
    return grad_TH, parts_BEH.sum(0)


def _columns(num_experts: int) -> int:
    return max(16, triton.next_power_of_2(num_experts))
