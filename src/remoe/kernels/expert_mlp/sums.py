"""Sums that gradients of the matrices are added to, in place of handing them to autograd."""

from torch import Tensor

Sums = tuple[Tensor, Tensor]
"""fp32, of the shapes [E, 2F, H] and [E, H, F]."""


def added(sums: Sums | None, grad_gate_up: Tensor, grad_down: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients themselves, or None for each once it is added to its sum."""
    if sums is None:
        return grad_gate_up, grad_down
    for matrix_sum, grad in zip(sums, (grad_gate_up, grad_down), strict=True):
        matrix_sum += grad
    return None, None
