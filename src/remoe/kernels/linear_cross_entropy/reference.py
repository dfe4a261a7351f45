"""What remoe::linear_cross_entropy makes of a chunk of logits, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

NO_LABEL = -100
"""The label of a row that does not count: torch's own default."""


def softmax_gradient_(logits_CV: Tensor, labels_C: Tensor, with_gradients: bool) -> Tensor:
    """Cross-entropy of each row in fp32 or wider [C]; with gradients the logits become softmax - onehot, in place."""
    wide_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    losses_C = F.cross_entropy(wide_CV, labels_C, ignore_index=NO_LABEL, reduction="none")
    if with_gradients:
        is_counted_C1 = (labels_C != NO_LABEL)[:, None]
        gradient_CV = wide_CV.softmax(dim=-1)
        gradient_CV.scatter_add_(1, labels_C.clamp(min=0)[:, None], -torch.ones_like(gradient_CV[:, :1]))
        logits_CV.copy_(gradient_CV.masked_fill(~is_counted_C1, 0))
    return losses_C
