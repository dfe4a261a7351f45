"""torch's grouped matrix product over the sorted rows: the path of GPUs in bf16, without waiting for the counts."""

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.kernels.expert_mlp.combine import gather_sum
from remoe.kernels.expert_mlp.sums import Sums, added

_ROWS_A_BLOCK = 16384
Lists = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
CHUNKS = False


def forward(
    hidden_TH: Tensor, weights_TE: Tensor, gate_up_proj: Tensor, down_proj: Tensor, lists: Lists, row_cap: int = 0
) -> tuple[Tensor, Tensor]:
    """See remoe::expert_mlp."""
    token_N, pair_N, row_N, expert_offsets, token_offsets = _without_tail(lists, 0)
    ends = expert_offsets[1:].to(torch.int32)
    x_NH = hidden_TH.index_select(0, token_N)
    if token_N.numel() == 0:
        return torch.zeros_like(hidden_TH), hidden_TH.new_empty((0, gate_up_proj.shape[1]))
    up_N2F = F.grouped_mm(x_NH, gate_up_proj.transpose(1, 2), offs=ends)
    gate_NF, up_NF = up_N2F.chunk(2, dim=-1)
    y_NH = F.grouped_mm(F.silu(gate_NF).mul_(up_NF), down_proj.transpose(1, 2), offs=ends)
    weights_N = weights_TE.flatten().index_select(0, pair_N)
    return gather_sum(y_NH, row_N, token_offsets, weights_N).to(hidden_TH.dtype), up_N2F


def backward(
    grad_out_TH: Tensor, up_N2F: Tensor, hidden_TH: Tensor, weights_TE: Tensor,
    gate_up_proj: Tensor, down_proj: Tensor, lists: Lists, row_cap: int = 0, sums: Sums | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See remoe::expert_mlp_backward."""
    token_N, pair_N, row_N, expert_offsets, token_offsets = _without_tail(lists, weights_TE.numel())
    if token_N.numel() == 0:
        zeros = (torch.zeros_like(matrix) for matrix in (gate_up_proj, down_proj))
        return torch.zeros_like(hidden_TH), torch.zeros_like(weights_TE), *added(sums, *zeros)
    ends = expert_offsets[1:].to(torch.int32)
    grad_y_NH = grad_out_TH.index_select(0, token_N)
    weights_N = weights_TE.flatten().index_select(0, pair_N.clamp(max=weights_TE.numel() - 1))
    grad_act_NF = F.grouped_mm(grad_y_NH, down_proj, offs=ends)
    act_NF, grad_up_N2F, grad_weights_N = _swiglu_backward(up_N2F, grad_act_NF, weights_N)
    idle_E11 = (expert_offsets.diff() == 0)[:, None, None]  # an empty group may leave its slice unwritten
    grad_down = F.grouped_mm(grad_y_NH.t(), act_NF, offs=ends).masked_fill_(idle_E11, 0)
    x_NH = hidden_TH.index_select(0, token_N)
    grad_gate_up = F.grouped_mm(grad_up_N2F.t(), x_NH, offs=ends).masked_fill_(idle_E11, 0)
    grad_x_NH = F.grouped_mm(grad_up_N2F, gate_up_proj, offs=ends)
    grad_pairs = weights_TE.new_zeros(weights_TE.numel() + 1)  # the last one takes the entries past the last pair
    grad_pairs.index_copy_(0, pair_N, grad_weights_N.to(weights_TE.dtype))
    grad_x_TH = gather_sum(grad_x_NH, row_N, token_offsets).to(hidden_TH.dtype)
    return grad_x_TH, grad_pairs[:-1].view_as(weights_TE).clone(), *added(sums, grad_gate_up, grad_down)


def _without_tail(lists: Lists, pair: int) -> Lists:
    """The lists with safe entries past the last pair: token 0, row 0 and this pair."""
    token_N, pair_N, row_N, expert_offsets, token_offsets = lists
    is_row_N = torch.arange(token_N.shape[0], device=token_N.device) < expert_offsets[-1]
    token_N, row_N = token_N.where(is_row_N, 0), row_N.where(is_row_N, 0)
    return token_N, pair_N.where(is_row_N, pair), row_N, expert_offsets, token_offsets


def _swiglu_backward(up_N2F: Tensor, grad_act_NF: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted activation, the gradient of the pre-activations, and of the gates.

    Computed in fp32, a block of rows at a time: wide temporaries of all rows would double the layer's peak memory.
    """
    act_NF, grad_up_N2F = torch.empty_like(grad_act_NF), torch.empty_like(up_N2F)
    grad_weights_N = torch.empty_like(weights_N)
    for first in range(0, up_N2F.shape[0], _ROWS_A_BLOCK):
        rows = slice(first, first + _ROWS_A_BLOCK)
        gate, up = up_N2F[rows].float().chunk(2, dim=-1)
        grad_act, weight = grad_act_NF[rows].float(), weights_N[rows, None]
        silu, sigmoid = F.silu(gate), torch.sigmoid(gate)
        act = silu * up
        grad_weights_N[rows] = (grad_act * act).sum(-1)
        act_NF[rows] = act.mul_(weight)
        grad_gate, grad_up = grad_up_N2F[rows].chunk(2, dim=-1)
        grad_act.mul_(weight)
        grad_up.copy_(silu * grad_act)
        # silu' = sigmoid + silu * (1 - sigmoid)
        grad_gate.copy_(torch.addcmul(sigmoid, silu, 1 - sigmoid).mul_(up).mul_(grad_act))
    return act_NF, grad_up_N2F, grad_weights_N
