"""Likeness of experts: RMoE's worked numbers (§9.9)."""

import math

import pytest
import torch

from remoe.moe.similarity import expert_similarity
from tests.moe.routers.rmoe_vectors import mat

W1 = torch.stack([mat(expert, 2, 2) for expert in (1, 2, 3)])
W2 = torch.stack([mat(3 + expert, 2, 2) for expert in (1, 2, 3)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_worked_similarity(dtype):
    found = expert_similarity([W1.to(dtype)], W2.to(dtype))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert found == pytest.approx((1.6671012774193286, 0.7503259580644964), abs=tolerance)


def test_equal_experts_have_cosine_1_and_the_published_statistic_counts_parts():
    same = torch.randn(1, 4, 3).expand(5, 4, 3)
    assert expert_similarity([same, same], same.mT) == pytest.approx((3.0, 1.0), abs=1e-12)


def test_unrelated_experts_have_cosine_0_but_not_the_published_statistic():
    torch.manual_seed(0)
    found = expert_similarity([torch.randn(16, 32, 4096)], torch.randn(16, 4096, 32))
    assert found.cosine == pytest.approx(0, abs=0.01)
    assert found.published == pytest.approx(2 / 16, abs=0.02)


def test_one_expert_has_no_pair():
    assert math.isnan(expert_similarity([torch.randn(1, 4, 3)], torch.randn(1, 3, 4)).cosine)
