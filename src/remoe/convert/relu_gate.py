"""A ReLU gate that does nearly what a Top-K gate does: fitted to tokens that the Top-K gate has routed."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from remoe.moe.gates import rms_normalized

EPS = 1e-6  # the router's default
_RIDGE = 1e-3  # of the mean square of a hidden feature: few tokens must not decide the offset's direction


class TopKTokens(NamedTuple):
    """What a Top-K router was given and what it did; all fp32."""

    hidden_TH: Tensor
    weights_TE: Tensor
    """Its gates, 0 where an expert was not chosen."""
    routing_map_TE: Tensor


class ReLUGate(NamedTuple):
    """Router relu with bias and normalised gates: R = ReLU(X W^T + b), weights R / rms(R) * scale."""

    weight: Tensor
    """[E, H]."""
    bias: Tensor
    """[E]."""
    scale: Tensor
    """[E]."""

    def __call__(self, hidden_TH: Tensor) -> Tensor:
        """The weights [T, E]."""
        return rms_normalized(F.linear(hidden_TH, self.weight, self.bias).relu(), self.scale, EPS)


def fit_relu_gate(weight_EH: Tensor, tokens: TopKTokens) -> ReLUGate:
    """A gate from a Top-K router's matrix and the tokens that it routed.

    Softmax and the choice of the k largest stay as they are when every logit of a token is lowered by the same number,
    so v X + c may be taken from the logits: the v that best predicts, by ridge regression, the middle between a token's
    last chosen and its first rejected logit. Then 0 is where Top-K draws its line, token by token. Each expert's own
    threshold gives it as many of these tokens as before (but for equal logits), so the mean number of active experts is
    k. Gates are normalised because those of Top-K do not vanish at that line; `scale` brings them, by least squares,
    closest to what they were. The gates before that sum to the same as Top-K's, for the L1 term.
    """
    weight_EH = weight_EH.float()
    boundary_T = _boundary(F.linear(tokens.hidden_TH, weight_EH), tokens.routing_map_TE)
    weight_EH = weight_EH - _predictor(tokens.hidden_TH, boundary_T)
    logits_TE = F.linear(tokens.hidden_TH, weight_EH)
    threshold_E = _keeping_loads(logits_TE, tokens.routing_map_TE.sum(0))
    gates_TE = (logits_TE - threshold_E).relu()
    size = _ratio(tokens.weights_TE.sum(), gates_TE.sum())
    unit_TE = rms_normalized(size * gates_TE, torch.ones_like(threshold_E), EPS)
    scale = _ratio((unit_TE * tokens.weights_TE).sum(), unit_TE.square().sum())
    return ReLUGate(size * weight_EH, -size * threshold_E, scale.expand_as(threshold_E).clone())


def overlap(routing_map_TE: Tensor, other_TE: Tensor) -> float:
    """The share of the first map's active pairs that the second has too."""
    return float((routing_map_TE & other_TE).sum() / routing_map_TE.sum().clamp(min=1))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """1 where nothing is open."""
    return torch.where(denominator > 0, numerator / denominator, torch.ones_like(numerator))


def _boundary(logits_TE: Tensor, routing_map_TE: Tensor) -> Tensor:
    """The middle between the smallest chosen and the largest rejected logit [T]."""
    chosen_T = logits_TE.masked_fill(~routing_map_TE, torch.inf).amin(1)
    rejected_T = logits_TE.masked_fill(routing_map_TE, -torch.inf).amax(1)
    return torch.where(rejected_T.isfinite(), (chosen_T + rejected_T) / 2, chosen_T)


def _predictor(hidden_TH: Tensor, target_T: Tensor) -> Tensor:
    """The v of the ridge regression target = v x + c; [H]."""
    features_TH = hidden_TH.double() - hidden_TH.double().mean(0)
    gram_HH = features_TH.mT @ features_TH
    gram_HH.diagonal().add_(_RIDGE * gram_HH.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    moment_H = features_TH.mT @ (target_T.double() - target_T.double().mean())
    return torch.linalg.solve(gram_HH, moment_H).to(hidden_TH.dtype)


def _keeping_loads(logits_TE: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """For each expert the middle between the last logit to be open and the first to be closed [E]."""
    sorted_TE = logits_TE.sort(dim=0, descending=True).values
    beyond_E = (sorted_TE[0] - sorted_TE[-1]).clamp(min=1.0)  # for experts that take no token, or all
    padded_TE = torch.cat(((sorted_TE[0] + beyond_E)[None], sorted_TE, (sorted_TE[-1] - beyond_E)[None]))
    first_closed_E = padded_TE.gather(0, tokens_per_expert_E[None] + 1)[0]
    return (padded_TE.gather(0, tokens_per_expert_E[None])[0] + first_closed_E) / 2
