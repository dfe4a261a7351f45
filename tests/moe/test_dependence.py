"""Mutual information between layers: RMoE's worked numbers (§9.7) and what each estimator can and cannot tell."""

import pytest
import torch

from remoe.moe.dependence import paired_probability_information, selection_dependence

A = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.05, 0.02, 0.02, 0.01]], dtype=torch.float64)
B = torch.tensor([[0.3, 0.3, 0.1, 0.1, 0.1, 0.05, 0.03, 0.02]], dtype=torch.float64)


def test_worked_information_of_paired_probabilities():
    # bins a [50,20,10,10,5,2,2,1], b [30,30,10,10,10,5,3,2]
    assert paired_probability_information(A, B).tolist() == pytest.approx([1.3208883431493221], abs=1e-9)
    assert paired_probability_information(A, A).tolist() == pytest.approx([1.7328679513998633], abs=1e-9)
    assert paired_probability_information(B, B).tolist() == pytest.approx([1.4941751382893083], abs=1e-9)


def test_paired_probabilities_depend_on_how_experts_are_numbered():
    assert paired_probability_information(A, B.flip(1)).tolist() == pytest.approx([1.1476015480093358], abs=1e-9)


def test_paired_probabilities_of_independent_flat_gates_are_high():
    # RMoE §6.6: 16 experts, independent logits of width .7 and 6
    torch.manual_seed(0)
    for width, expected in ((0.7, 1.442), (6.0, 0.140)):
        first = (width * torch.randn(2000, 16, dtype=torch.float64)).softmax(1)
        second = (width * torch.randn(2000, 16, dtype=torch.float64)).softmax(1)
        assert paired_probability_information(first, second).mean().item() == pytest.approx(expected, abs=0.02)


def test_worked_information_of_selections():
    first, second = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), torch.tensor([1, 1, 2, 2, 3, 3, 0, 2])
    found = selection_dependence(first, second)
    assert found.information == pytest.approx(1.147601548009336, abs=1e-9)
    assert found.entropies == pytest.approx((1.3862943611198906, 1.3208883431493221), abs=1e-9)
    assert found.normalized == pytest.approx(0.8480673495592446, abs=1e-9)


def test_selections_do_not_depend_on_how_experts_are_numbered():
    torch.manual_seed(0)
    first, second = torch.randint(5, (300,)), torch.randint(5, (300,))
    renamed = torch.tensor([3, 0, 4, 1, 2])[second]
    assert selection_dependence(first, renamed).information == pytest.approx(
        selection_dependence(first, second).information, abs=1e-12
    )


@pytest.mark.parametrize(("num_tokens", "expected"), [(1000, 0.1125), (10_000, 0.01125)])
def test_independent_selections_have_the_expected_bias_and_nothing_beyond_it(num_tokens, expected):
    torch.manual_seed(0)
    draws = [selection_dependence(*torch.randint(16, (2, num_tokens))) for _ in range(20)]
    assert sum(found.bias for found in draws) / 20 == pytest.approx(expected, rel=0.05)
    assert sum(found.information for found in draws) / 20 == pytest.approx(expected, rel=0.1)
