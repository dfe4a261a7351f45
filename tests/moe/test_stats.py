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
    assert stats.flip_rate(before[1:], after[1:]).item() == pytest.approx(1 / 3, abs=1e-7)
    assert 4 * stats.flip_rate(before, after).item() == pytest.approx(1.1666666666666667, abs=1e-6)


def test_worked_sparsity_of_two_layers_is_that_of_all_their_pairs():
    # TV3: .5625 and .4375
    layers = [router_with(W)(inputs) for inputs in (X, 0.5 * X[:, [1, 2, 0]])]
    assert [1 - stats.density(routing).item() for routing in layers] == [0.5625, 0.4375]
    active, total = (
        sum(count(routing).item() for routing in layers) for count in (stats.active_pairs, stats.total_pairs)
    )
    assert 1 - active / total == 0.5


def test_gate_statistics_at_their_ends():
    flat, sharp = torch.zeros(1, 16), torch.tensor([[100.0] + [0.0] * 15])
    both = torch.zeros(1, 16, dtype=torch.bool).index_fill(1, torch.tensor([0, 1]), True)
    of_flat, of_sharp = (Routing(both.float(), both, logits) for logits in (flat, sharp))
    assert stats.gate_entropy(of_flat).item() == pytest.approx(math.log(16), abs=1e-12)
    assert stats.outer_balance(of_flat).item() == pytest.approx(0.125, abs=1e-12)
    assert stats.inner_balance(of_flat).item() == 1
    assert stats.gate_entropy(of_sharp).item() == pytest.approx(0, abs=1e-12)
    assert stats.outer_balance(of_sharp).item() == pytest.approx(1, abs=1e-12)
