"""Statistics against worked numbers (TV1, TV5)."""

import math

import pytest
import torch

from remoe import RouterContext, Routing
from remoe.moe import stats
from tests.moe.test_gates_and_routers import W, X, router_with


def maps(*rows):
    return [torch.tensor(layer, dtype=torch.bool) for layer in rows]


def test_worked_counts_and_sparsity():
    routing = router_with(W)(X)
    assert stats.tokens_per_expert(routing).tolist() == [1, 3, 2, 1]
    assert stats.active_per_token(routing).tolist() == [1, 2, 1, 3]
    assert stats.active_pairs(routing).item() == 7
    assert stats.total_pairs(routing).item() == 16
    assert 1 - stats.density(routing).item() == 0.5625


def test_masked_tokens_do_not_count():
    routing = router_with(W)(X, RouterContext(token_mask_T=torch.tensor([True, True, False, False])))
    assert stats.total_pairs(routing).item() == 8
    assert stats.active_pairs(routing).item() == 3
    assert stats.tokens_without_expert(routing).item() == 0


def test_tokens_without_expert_are_counted():
    weights = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert stats.tokens_without_expert(Routing(weights, weights > 0)).item() == 2


def test_load_entropy_is_log_e_when_even_and_zero_when_one_expert_takes_all():
    even, one = torch.eye(4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
    one[:, 2] = True
    assert stats.load_entropy(Routing(even.float(), even)).item() == pytest.approx(math.log(4), abs=1e-12)
    assert stats.load_entropy(Routing(one.float(), one)).item() == 0
    assert stats.load_entropy(Routing(one.float() * 0, one & False)).item() == 0


def test_worked_flip_rate():
    before = maps([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 1]], [[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]])
    after = maps([[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 1]], [[0, 1, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]])
    assert stats.flip_rate(before, after).item() == pytest.approx(0.2916666666666667, abs=1e-7)
    assert stats.flip_rate(before[:1], after[:1]).item() == pytest.approx(0.25, abs=1e-7)
