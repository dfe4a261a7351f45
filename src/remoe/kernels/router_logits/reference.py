"""The meaning of a router's logits and of their gradients."""

from torch import Tensor


def router_logits(hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """logits = X W^T, in the weight's dtype."""
    return hidden_TH.to(weight_EH.dtype) @ weight_EH.T


def gradients(grad_TE: Tensor, hidden_TH: Tensor, weight_EH: Tensor) -> tuple[Tensor, Tensor]:
    """Those of X and of W, each in its dtype."""
    grad_hidden_TH = (grad_TE @ weight_EH).to(hidden_TH.dtype)
    return grad_hidden_TH, grad_TE.T @ hidden_TH.to(weight_EH.dtype)
