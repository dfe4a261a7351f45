"""Whether a candidate computes the layer: its output and gradients against plain PyTorch in a wider type."""

from collections.abc import Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.bench.problem import Problem, Routing

TENSORS = ("out", "grad_hidden", "grad_gate_up", "grad_down", "grad_weights")
WORST_RATIO = 1.5
"""How much larger our error may be than that of the plain path in the same type."""
OTHER_LAYER = 0.05
"""A peer whose error is larger than this computes something else: its time says nothing."""
_ELEMENTS_AT_ONCE = 1 << 26

Errors = dict[str, float]


class Expected(NamedTuple):
    """The reference of one problem and routing, and the errors of the plain path in the problem's own type."""

    results: dict[str, Tensor]
    plain: Errors


def expected(problem: Problem, routing: Routing) -> Expected:
    """Compute the reference in fp32 (fp64 for fp32 inputs), without TF32."""
    wide = torch.float64 if problem.dtype == torch.float32 else torch.float32
    with _full_precision():
        results = plain_results(problem, routing, wide)
        return Expected(results, errors(plain_results(problem, routing, problem.dtype), results, routing))


def errors(results: Mapping[str, Tensor], reference: Mapping[str, Tensor], routing: Routing) -> Errors:
    """Relative Frobenius error of each tensor. Gradients of gates that are off are nobody's concern."""
    found = {name: relative_error(results[name], reference[name]) for name in TENSORS[:-1]}
    grads, wanted = results["grad_weights"], reference["grad_weights"]
    if routing.index_TK is None:
        is_active_TE = routing.weights.detach() > 0
        grads, wanted = grads * is_active_TE, wanted * is_active_TE
    return found | {"grad_weights": relative_error(grads, wanted)}


def relative_error(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference|, computed a part at a time; NaN where the value has one."""
    difference = norm = torch.zeros((), dtype=torch.float64, device=reference.device)
    parts = zip(*(t.detach().reshape(-1).split(_ELEMENTS_AT_ONCE) for t in (value, reference)), strict=True)
    for a, b in parts:
        difference = difference + (a.to(b.dtype) - b).square().sum(dtype=torch.float64)
        norm = norm + b.square().sum(dtype=torch.float64)
    return float((difference / norm.clamp(min=1e-300)).sqrt())


def too_large(found: Errors, plain: Errors, dtype: torch.dtype) -> list[str]:
    """The tensors of ours whose error is above WORST_RATIO times the plain path's, each with its figures."""
    # fp32 sums are rounded at each addition, sqrt(n) roundings of eps / 2 after n in sequence: 16 for sums of 256,
    # the least that a layer has. How a library splits them decides which of two paths is nearer.
    rounding = 16 * torch.finfo(dtype).eps / 2 if dtype == torch.float32 else 0.0
    limits = {name: max(WORST_RATIO * plain[name], rounding) for name in TENSORS}
    return [
        f"{name}: {found[name]:.3e}, allowed {limits[name]:.3e} ({WORST_RATIO} x plain {plain[name]:.3e})"
        for name in TENSORS
        if not found[name] <= limits[name]
    ]


def of_another_layer(found: Errors) -> list[str]:
    """The tensors of a peer that are not this layer's."""
    return [f"{name}: {found[name]:.3e}, allowed {OTHER_LAYER}" for name in TENSORS if not found[name] <= OTHER_LAYER]


def plain_results(problem: Problem, routing: Routing, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients of the layer by plain PyTorch: one expert after the other, products in `dtype`.

    Weighted rows are summed in fp32 or wider, over experts in order; so are the gradients of the hidden states.
    """
    leaves = [leaf.detach().to(_at_least(dtype, leaf)).requires_grad_() for leaf in problem.leaves(routing)]
    own = routing._replace(weights=leaves[3])
    out_TH = _plain_layer(leaves, own, dtype)
    grads = torch.autograd.grad(out_TH, leaves, problem.grad_out_TH.to(out_TH.dtype))
    return dict(zip(TENSORS, (out_TH.detach(), *grads), strict=True))


def _at_least(dtype: torch.dtype, leaf: Tensor) -> torch.dtype:
    return torch.promote_types(dtype, leaf.dtype)


def _plain_layer(leaves: list[Tensor], routing: Routing, dtype: torch.dtype) -> Tensor:
    hidden_TH, gate_up_proj, down_proj, _ = leaves
    weights_TE, map_TE = routing.dense()
    sum_dtype = torch.promote_types(dtype, torch.float32)
    wide_hidden_TH = hidden_TH.to(sum_dtype)  # so that its gradient is summed in this type over experts
    out_TH = torch.zeros_like(wide_hidden_TH)
    experts = zip(gate_up_proj.unbind(), down_proj.unbind(), weights_TE.unbind(1), map_TE.unbind(1), strict=True)
    for gate_up, down, weights_T, is_active_T in experts:
        token_n = is_active_T.nonzero().view(-1)
        gate_nF, up_nF = F.linear(wide_hidden_TH.index_select(0, token_n).to(dtype), gate_up).chunk(2, -1)
        y_nH = F.linear(F.silu(gate_nF) * up_nF, down).to(sum_dtype)
        weights_n1 = weights_T.index_select(0, token_n)[:, None].to(sum_dtype)
        out_TH = out_TH.index_add(0, token_n, weights_n1 * y_nH)
    return out_TH.to(dtype)


@contextmanager
def _full_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
