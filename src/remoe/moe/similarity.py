"""How alike the experts of a layer are, by their mean input and output weights (RMoE Fig. 5, §4.20)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Similarity(NamedTuple):
    """Of E experts."""

    published: float
    """RMoE's statistic: mean over all E^2 pairs of the summed cosines of all parts, an expert with itself included."""
    cosine: float
    """Mean cosine of a part of two different experts: 0 for unrelated ones, 1 for equal ones; nan for one expert."""


def expert_similarity(input_projs: Sequence[Tensor], output_proj: Tensor) -> Similarity:
    """Compare experts by matrices averaged over their hidden units.

    `input_projs`: [E, F, H] each (one for ReLU experts; gate and up for SwiGLU); `output_proj`: [E, H, F].
    """
    parts_EH = [proj.double().mean(dim=1) for proj in input_projs] + [output_proj.double().mean(dim=2)]
    units_EX = torch.cat([F.normalize(part_EH, dim=1) for part_EH in parts_EH], dim=1)
    gram_EE = units_EX @ units_EX.mT
    num_experts = len(gram_EE)
    between = gram_EE.sum() - gram_EE.diagonal().sum()
    num_pairs = num_experts * (num_experts - 1)
    cosine = float(between) / (num_pairs * len(parts_EH)) if num_pairs else float("nan")
    return Similarity(published=float(gram_EE.mean()), cosine=cosine)
