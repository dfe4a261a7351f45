"""From router logits to gate values and a routing map: what routers share, so that they never import each other."""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_logits(hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """logits_TE = X W^T in fp32 or wider, also under autocast: rounding near a gate's threshold flips experts."""
    dtype = torch.promote_types(weight_EH.dtype, torch.float32)
    with torch.autocast(hidden_TH.device.type, enabled=False):  # autocast would undo the cast
        return F.linear(hidden_TH.to(dtype), weight_EH.to(dtype))


def relu(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Gate = ReLU(logit), active where it is above 0 (ReMoE eq. 6): weights_TE, routing_map_TE."""
    weights_TE = logits_TE.relu()
    return weights_TE, weights_TE > 0


def rms_normalized(weights_TE: Tensor, scale_E: Tensor, eps: float) -> Tensor:
    """Each token's gates divided by their root mean square over the E experts, times scale_E (BlockFFN).

    A token without experts keeps gates of 0; eps makes gates fade to 0 instead of jumping when the last one closes.
    """
    mean_square_T1 = weights_TE.square().mean(dim=-1, keepdim=True)
    return weights_TE * torch.rsqrt(mean_square_T1 + eps) * scale_E.to(weights_TE.dtype)


def topk_softmax(
    logits_TE: Tensor, top_k: int, renormalize: bool, num_active: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gate = softmax probability of the top_k largest, 0 elsewhere (ReMoE §4.2): weights_TE, routing_map_TE.

    `num_active`, a 0-dim tensor up to top_k, keeps only so many: a k that changes on the device.
    """
    probs_TE = logits_TE.softmax(dim=-1)
    index_TK = probs_TE.topk(top_k, dim=-1).indices
    is_active_TK = torch.ones_like(index_TK, dtype=torch.bool)
    if num_active is not None:
        is_active_TK = is_active_TK & (torch.arange(top_k, device=index_TK.device) < num_active)
    routing_map_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter(1, index_TK, is_active_TK)
    weights_TE = probs_TE.masked_fill(~routing_map_TE, 0)
    if renormalize:
        weights_TE = weights_TE / weights_TE.sum(dim=-1, keepdim=True)
    return weights_TE, routing_map_TE
