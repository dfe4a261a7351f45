"""remoe::expert_mlp: gather rows, SwiGLU experts, weigh by the gate and sum per token, as one op with its gradients."""

# pyright: reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
# (torch.library has no precise types)

from typing import Any

import torch
from torch import Tensor

from remoe.kernels.expert_mlp import grouped, per_expert


@torch.library.custom_op("remoe::expert_mlp", mutates_args=())
def expert_mlp(
    hidden_TH: Tensor, weights_TE: Tensor, gate_up_proj: Tensor, down_proj: Tensor,
    token_N: Tensor, pair_N: Tensor, row_N: Tensor, expert_offsets: Tensor, token_offsets: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out_TH = sum over a token's rows of weight * down(silu(gate x) * (up x)), and the kept pre-activations.

    gate_up_proj [E, 2F, H] (gate rows first) and down_proj [E, H, F] have hidden_TH's dtype, weights_TE is fp32 or
    wider. The lists are those of `dispatch_lists`. A token without rows gets 0. The second output [N, 2F] is what the
    backward pass needs and nothing else. Same bits each run.
    """
    lists = (token_N, pair_N, row_N, expert_offsets, token_offsets)
    return per_expert.forward(hidden_TH, weights_TE, gate_up_proj, down_proj, lists)


@torch.library.custom_op("remoe::expert_mlp_backward", mutates_args=())
def expert_mlp_backward(
    grad_out_TH: Tensor, up_N2F: Tensor, hidden_TH: Tensor, weights_TE: Tensor, gate_up_proj: Tensor,
    down_proj: Tensor, token_N: Tensor, pair_N: Tensor, row_N: Tensor, expert_offsets: Tensor, token_offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden_TH, weights_TE, gate_up_proj and down_proj; zeros where no row passed."""
    lists = (token_N, pair_N, row_N, expert_offsets, token_offsets)
    return per_expert.backward(grad_out_TH, up_N2F, hidden_TH, weights_TE, gate_up_proj, down_proj, lists)


@expert_mlp.register_kernel("cuda")
def _(
    hidden_TH: Tensor, weights_TE: Tensor, gate_up_proj: Tensor, down_proj: Tensor,
    token_N: Tensor, pair_N: Tensor, row_N: Tensor, expert_offsets: Tensor, token_offsets: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lists = (token_N, pair_N, row_N, expert_offsets, token_offsets)
    path = grouped if hidden_TH.dtype == torch.bfloat16 else per_expert
    return path.forward(hidden_TH, weights_TE, gate_up_proj, down_proj, lists)


@expert_mlp_backward.register_kernel("cuda")
def _(
    grad_out_TH: Tensor, up_N2F: Tensor, hidden_TH: Tensor, weights_TE: Tensor, gate_up_proj: Tensor,
    down_proj: Tensor, token_N: Tensor, pair_N: Tensor, row_N: Tensor, expert_offsets: Tensor, token_offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    lists = (token_N, pair_N, row_N, expert_offsets, token_offsets)
    path = grouped if hidden_TH.dtype == torch.bfloat16 else per_expert
    return path.backward(grad_out_TH, up_N2F, hidden_TH, weights_TE, gate_up_proj, down_proj, lists)


@expert_mlp.register_fake
def _(hidden_TH: Tensor, weights_TE: Tensor, gate_up_proj: Tensor, down_proj: Tensor, token_N: Tensor, *lists: Tensor):
    return torch.empty_like(hidden_TH), hidden_TH.new_empty((token_N.shape[0], gate_up_proj.shape[1]))


@expert_mlp_backward.register_fake
def _(
    grad_out_TH: Tensor, up_N2F: Tensor, hidden_TH: Tensor, weights_TE: Tensor, gate_up_proj: Tensor,
    down_proj: Tensor, *lists: Tensor,
):  # fmt: skip
    return tuple(torch.empty_like(x) for x in (hidden_TH, weights_TE, gate_up_proj, down_proj))


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else a [N, 2F] of zeros stands for the gradient of the kept pre-activations
    ctx.save_for_backward(output[1], *inputs)


def _backward(ctx: Any, grad_out_TH: Tensor | None, _grad_up: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out_TH is None:  # nothing downstream used the output
        return (None,) * 9
    gradients = expert_mlp_backward(grad_out_TH.contiguous(), *ctx.saved_tensors)
    return (*gradients, None, None, None, None, None)


expert_mlp.register_autograd(_backward, setup_context=_save_for_backward)
