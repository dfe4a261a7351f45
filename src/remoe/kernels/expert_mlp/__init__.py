"""remoe::expert_mlp: gather rows, SwiGLU experts, weigh by the gate and sum per token, as one op with its gradients."""

# pyright: reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
# (torch.library has no precise types)

from typing import Any, cast

import torch
from torch import Tensor

from remoe.kernels.expert_mlp import backends


@torch.library.custom_op("remoe::expert_mlp", mutates_args=())
def expert_mlp(
    hidden_TH: Tensor, weights_TE: Tensor, gate_up_proj: Tensor, down_proj: Tensor,
    token_N: Tensor, pair_N: Tensor, row_N: Tensor, expert_offsets: Tensor, token_offsets: Tensor,
    row_cap: int = 0, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out_TH = sum over a token's rows of weight * down(silu(gate x) * (up x)), and the kept pre-activations.

    gate_up_proj [E, 2F, H] (gate rows first) and down_proj [E, H, F] have hidden_TH's dtype, weights_TE is fp32 or
    wider. The lists are those of `dispatch_lists`. A token without rows gets 0. The second output [N, 2F] is what the
    backward pass needs and nothing else. Same bits each run.

    `backend` is one of backends.NAMES. With more rows than `row_cap` (0: no cap) the Triton path works them off in
    chunks and keeps nothing: its memory does not grow with the rows, its backward pass computes them again.
    """
    lists = (token_N, pair_N, row_N, expert_offsets, token_offsets)
    path = backends.pick(backend, hidden_TH)
    return path.forward(hidden_TH, weights_TE, gate_up_proj, down_proj, lists, row_cap)


@torch.library.custom_op("remoe::expert_mlp_backward", mutates_args=())
def expert_mlp_backward(
    grad_out_TH: Tensor, up_N2F: Tensor, hidden_TH: Tensor, weights_TE: Tensor, gate_up_proj: Tensor,
    down_proj: Tensor, token_N: Tensor, pair_N: Tensor, row_N: Tensor, expert_offsets: Tensor, token_offsets: Tensor,
    row_cap: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden_TH, weights_TE, gate_up_proj and down_proj; zeros where no row passed."""
    lists = (token_N, pair_N, row_N, expert_offsets, token_offsets)
    path = backends.pick(backend, hidden_TH)
    return path.backward(grad_out_TH, up_N2F, hidden_TH, weights_TE, gate_up_proj, down_proj, lists, row_cap)


@expert_mlp.register_fake
def _(
    hidden_TH: Tensor, weights_TE: Tensor, gate_up_proj: Tensor, down_proj: Tensor,
    token_N: Tensor, pair_N: Tensor, row_N: Tensor, expert_offsets: Tensor, token_offsets: Tensor,
    row_cap: int = 0, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_rows = token_N.shape[0]
    is_chunked = row_cap > 0 and backends.pick(backend, hidden_TH).CHUNKS
    is_known = isinstance(num_rows, int)  # pyright: ignore[reportUnnecessaryIsInstance]  (else a symbol of the tracer)
    if is_chunked and is_known:
        num_rows = num_rows if num_rows <= row_cap else 0
    elif is_chunked:  # which of the two is known only once the rows are
        num_rows = cast(int, torch.library.get_ctx().new_dynamic_size())
    return torch.empty_like(hidden_TH), hidden_TH.new_empty((num_rows, gate_up_proj.shape[1]))


@expert_mlp_backward.register_fake
def _(
    grad_out_TH: Tensor, up_N2F: Tensor, hidden_TH: Tensor, weights_TE: Tensor, gate_up_proj: Tensor,
    down_proj: Tensor, *lists_and_settings: Any,
):  # fmt: skip
    return tuple(torch.empty_like(x) for x in (hidden_TH, weights_TE, gate_up_proj, down_proj))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.row_cap, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else a [N, 2F] of zeros stands for the gradient of the kept pre-activations
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx: Any, grad_out_TH: Tensor | None, _grad_up: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out_TH is None:  # nothing downstream used the output
        return (None,) * 11
    gradients = expert_mlp_backward(grad_out_TH.contiguous(), *ctx.saved_tensors, ctx.row_cap, ctx.backend)
    return (*gradients, *(None,) * 7)


expert_mlp.register_autograd(_backward, setup_context=_save_for_backward)
