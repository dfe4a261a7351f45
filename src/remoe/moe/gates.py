"""From router logits to gate values and a routing map: what routers share, so that they never import each other."""

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.kernels.router_logits import is_worth_it, router_logits


def linear_logits(hidden_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """logits_TE = X W^T + b in fp32 or wider, also under autocast: rounding near a gate's threshold flips experts."""
    dtype = torch.promote_types(weight_EH.dtype, torch.float32)
    weight_EH, bias_E = weight_EH.to(dtype), None if bias_E is None else bias_E.to(dtype)
    with torch.autocast(hidden_TH.device.type, enabled=False):  # autocast would undo the cast
        if is_worth_it(hidden_TH, weight_EH):
            logits_TE = router_logits(hidden_TH, weight_EH)
            return logits_TE if bias_E is None else logits_TE + bias_E
        return F.linear(hidden_TH.to(dtype), weight_EH, bias_E)


def cosine_logits(
    hidden_TH: Tensor, weight_EH: Tensor, temperature: Tensor | float = 1.0, unit_hidden: bool = True
) -> Tensor:
    """logits_TE = cos(x, w_e) / temperature (RMoE §3.5) in fp32 or wider, also under autocast.

    Without `unit_hidden` only the w_e are unit vectors, and the length of x counts (RMoE's base code, §3.6, §3.7).
    """
    dtype = torch.promote_types(weight_EH.dtype, torch.float32)
    with torch.autocast(hidden_TH.device.type, enabled=False):
        hidden_TH, weight_EH = hidden_TH.to(dtype), F.normalize(weight_EH.to(dtype), dim=-1)
        return F.linear(F.normalize(hidden_TH, dim=-1) if unit_hidden else hidden_TH, weight_EH) / temperature


def renormalizes(renormalize: bool | None, top_k: int) -> bool:
    """The routers' option of that name; None: as RMoE does from k = 2 on.

    With k = 1 the one gate would become 1, and the router would learn nothing from the language-model loss.
    """
    return top_k > 1 if renormalize is None else renormalize


def relu(logits_TE: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    """Gate = ReLU(logit), active where it is above 0 (ReMoE eq. 6): weights_TE, routing_map_TE.

    A threshold above 0 cuts gates up to it and leaves the others as they are; one below 0 is a shift, the ReLU of
    logit - threshold, which opens gates that were closed (docs/decisions/0025).
    """
    if threshold == 0:
        weights_TE = logits_TE.relu()
        return weights_TE, weights_TE > 0
    routing_map_TE = logits_TE > threshold
    return (logits_TE - min(threshold, 0.0)).masked_fill(~routing_map_TE, 0), routing_map_TE


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
