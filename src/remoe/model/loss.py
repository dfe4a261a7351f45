"""The output head and the cross-entropy of the next token: what training and validation need instead of logits."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from remoe.kernels.linear_cross_entropy import NO_LABEL, linear_cross_entropy
from remoe.moe.experts import in_compute_dtype


class Head(NamedTuple):
    """The output head: logits = hidden W^T + b."""

    weight_VH: Tensor
    bias_V: Tensor | None

    def logits(self, hidden_BSH: Tensor) -> Tensor:
        """[B, S, V], in autocast's dtype or the tensor's."""
        return F.linear(hidden_BSH, self.weight_VH, self.bias_V)

    def losses(self, hidden_BSH: Tensor, labels_BS: Tensor, reduction: str) -> Tensor:
        """Cross-entropies in fp32 or wider: `sum` 0-dim, or `none` [B, S] with 0 where the label is -100.

        On a GPU no more than a part of the logits exists at a time. `none` has no gradient there.
        """
        if not hidden_BSH.is_cuda:
            logits_TV = self.logits(hidden_BSH).flatten(0, 1)
            wide_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
            losses = F.cross_entropy(wide_TV, labels_BS.flatten(), ignore_index=NO_LABEL, reduction=reduction)
            return losses if reduction == "sum" else losses.view_as(labels_BS)
        return self.chunked_losses(hidden_BSH, labels_BS, reduction)

    def chunked_losses(self, hidden_BSH: Tensor, labels_BS: Tensor, reduction: str) -> Tensor:
        """The same on any device, a part of the logits at a time."""
        hidden_TH = in_compute_dtype(hidden_BSH).flatten(0, 1)
        bias_V = None if self.bias_V is None else self.bias_V.to(hidden_TH.dtype)
        with_gradients = reduction == "sum" and torch.is_grad_enabled()
        total, losses_T, *_ = linear_cross_entropy(
            hidden_TH, self.weight_VH.to(hidden_TH.dtype), bias_V, labels_BS.flatten(), with_gradients
        )
        return total if reduction == "sum" else losses_T.view_as(labels_BS)
