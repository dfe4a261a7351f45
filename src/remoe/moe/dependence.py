"""How much the routing of one layer says about that of another: mutual information, in nats (RMoE §4.18, §6.6)."""

from typing import NamedTuple

import torch
from torch import Tensor

_EDGES = 100
"""RMoE's estimator sorts probabilities into the 99 intervals between this many edges from 0 to 1."""


class Dependence(NamedTuple):
    """Of two label sequences, in nats."""

    information: float
    """Mutual information as counted (plug-in): above 0 also for independent labels."""
    bias: float
    """What independent labels would give on average (Miller and Madow): subtract it."""
    entropies: tuple[float, float]

    @property
    def normalized(self) -> float:
        """Information over the geometric mean of both entropies: 1 where each layer decides the other."""
        return self.information / (self.entropies[0] * self.entropies[1]) ** 0.5


def selection_dependence(first_T: Tensor, second_T: Tensor) -> Dependence:
    """Of two layers' selections over the same tokens: each token's label (its first expert, say), int64 [T] each.

    This is the honest measure: it compares decisions over tokens, and any naming of the experts gives the same value.
    """
    num_tokens = first_T.numel()
    num_labels = int(max(first_T.max(), second_T.max())) + 1
    joint = torch.bincount(first_T * num_labels + second_T, minlength=num_labels**2).view(num_labels, num_labels)
    counts = joint.double(), joint.sum(1).double(), joint.sum(0).double()
    joint_entropy, *entropies = (_entropy(count / num_tokens) for count in counts)
    used_pairs, used_first, used_second = (int((count > 0).sum()) for count in counts)
    return Dependence(
        information=entropies[0] + entropies[1] - joint_entropy,
        bias=(used_pairs - used_first - used_second + 1) / (2 * num_tokens),
        entropies=(entropies[0], entropies[1]),
    )


def paired_probability_information(first_TE: Tensor, second_TE: Tensor) -> Tensor:
    """RMoE's own estimator, one value a token [T]: to compare with its figures, and with nothing else.

    It sorts the E probabilities of a token into bins and takes experts of equal number in both layers for repeated
    draws, so it depends on how experts are numbered, and flat gates alone give high values (RMoE §6.6).
    """
    first_TE1, second_TE1 = (_bins(probs_TE).unsqueeze(-1) for probs_TE in (first_TE, second_TE))
    same_first_TEE, same_second_TEE = first_TE1 == first_TE1.mT, second_TE1 == second_TE1.mT
    num_experts = first_TE.shape[1]
    joint_TE = (same_first_TEE & same_second_TEE).sum(-1).double()
    expected_TE = same_first_TEE.sum(-1).double() * same_second_TEE.sum(-1) / num_experts
    return (joint_TE / expected_TE).log().mean(dim=-1)


def _bins(probs_TE: Tensor) -> Tensor:
    """1 for the interval that starts at 0."""
    edges = torch.linspace(0, 1, _EDGES, dtype=torch.float64, device=probs_TE.device)
    return torch.bucketize(probs_TE.double(), edges, right=True)


def _entropy(shares: Tensor) -> float:
    return float(-torch.xlogy(shares, shares).sum())
