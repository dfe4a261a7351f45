"""remoe::expert_mlp: gather rows, SwiGLU experts, weigh by the gate and sum per token, as one op with its gradients."""

# pyright: reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
# (torch.library has no precise types)

from typing import Any, cast

import torch
from torch import Tensor

from remoe.kernels.expert_mlp import backends
from remoe.kernels.expert_mlp.chunks import kept_rows


@torch.library.custom_op("remoe::expert_mlp", mutates_args=())
def expert_mlp(
    hidden_TH: Tensor, weights_TE: Tensor, gate_up_proj: Tensor, down_proj: Tensor,
    token_N: Tensor, pair_N: Tensor, row_N: Tensor, expert_offsets: Tensor, token_offsets: Tensor,
    row_cap: int = 0, backend: str = "auto", gate_up_sum: Tensor | None = None, down_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out_TH = sum over a token's rows of weight * down(silu(gate x) * (up x)), and the kept pre-activations.

    gate_up_proj [E, 2F, H] (gate rows first) and down_proj [E, H, F] have hidden_TH's dtype, weights_TE is fp32 or
    wider. The lists are those of `dispatch_lists`. A token without rows gets 0. The second output [N, 2F] is what the
    backward pass needs and nothing else. Same bits each run.

    `backend` is one of backends.NAMES. With more rows than `row_cap` (0: no cap) the fused path works them off in
    chunks and keeps the first: its memory is bounded, its backward pass computes the others again.

    With `gate_up_sum` and `down_sum`, fp32 and shaped as the matrices, the backward pass adds the gradients of the
    matrices to them, and autograd gets none: gradient accumulation in bf16 training needs no other pass over all
    weights. On the fused path they are not rounded to bf16 before they are added.
    """
    assert (gate_up_sum is None) == (down_sum is None), "both sums or none"
    assert gate_up_sum is None or gate_up_sum.dtype == torch.float32, "sums are fp32"
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
    grads = path.backward(grad_out_TH, up_N2F, hidden_TH, weights_TE, gate_up_proj, down_proj, lists, row_cap)
    return cast(tuple[Tensor, Tensor, Tensor, Tensor], grads)


@torch.library.custom_op("remoe::expert_mlp_backward_adding", mutates_args=("gate_up_sum", "down_sum"))
def expert_mlp_backward_adding(
    grad_out_TH: Tensor, up_N2F: Tensor, hidden_TH: Tensor, weights_TE: Tensor, gate_up_proj: Tensor,
    down_proj: Tensor, token_N: Tensor, pair_N: Tensor, row_N: Tensor, expert_offsets: Tensor, token_offsets: Tensor,
    row_cap: int, backend: str, gate_up_sum: Tensor, down_sum: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden_TH and weights_TE; those of the matrices are added to the sums."""
    lists = (token_N, pair_N, row_N, expert_offsets, token_offsets)
    arguments = (grad_out_TH, up_N2F, hidden_TH, weights_TE, gate_up_proj, down_proj, lists, row_cap)
    grads = backends.pick(backend, hidden_TH).backward(*arguments, (gate_up_sum, down_sum))
    return grads[0], grads[1]


@expert_mlp.register_fake
def _(
    hidden_TH: Tensor, weights_TE: Tensor, gate_up_proj: Tensor, down_proj: Tensor,
    token_N: Tensor, pair_N: Tensor, row_N: Tensor, expert_offsets: Tensor, token_offsets: Tensor,
    row_cap: int = 0, backend: str = "auto", gate_up_sum: Tensor | None = None, down_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_rows = token_N.shape[0]
    is_chunked = row_cap > 0 and backends.pick(backend, hidden_TH).CHUNKS
    is_known = isinstance(num_rows, int)  # pyright: ignore[reportUnnecessaryIsInstance]  (else a symbol of the tracer)
    if is_chunked and is_known:
        num_rows = kept_rows(num_rows, row_cap)
    elif is_chunked:  # known only once the rows are
        num_rows = cast(int, torch.library.get_ctx().new_dynamic_size())
    return torch.empty_like(hidden_TH), hidden_TH.new_empty((num_rows, gate_up_proj.shape[1]))


@expert_mlp_backward.register_fake
def _(
    grad_out_TH: Tensor, up_N2F: Tensor, hidden_TH: Tensor, weights_TE: Tensor, gate_up_proj: Tensor,
    down_proj: Tensor, *lists_and_settings: Any,
):  # fmt: skip
    return tuple(torch.empty_like(x) for x in (hidden_TH, weights_TE, gate_up_proj, down_proj))


@expert_mlp_backward_adding.register_fake
def _(
    grad_out_TH: Tensor, up_N2F: Tensor, hidden_TH: Tensor, weights_TE: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(hidden_TH), torch.empty_like(weights_TE)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.row_cap, ctx.backend, gate_up_sum, down_sum = inputs
    ctx.sums = None if gate_up_sum is None else (gate_up_sum, down_sum)  # not saved: another pass may add before this
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else a [N, 2F] of zeros stands for the gradient of the kept pre-activations
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx: Any, grad_out_TH: Tensor | None, _grad_up: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out_TH is None:  # nothing downstream used the output
        return (None,) * 13
    arguments = (grad_out_TH.contiguous(), *ctx.saved_tensors, ctx.row_cap, ctx.backend)
    if ctx.sums is None:
        return (*expert_mlp_backward(*arguments), *(None,) * 9)
    return (*expert_mlp_backward_adding(*arguments, *ctx.sums), *(None,) * 11)


expert_mlp.register_autograd(_backward, setup_context=_save_for_backward)
