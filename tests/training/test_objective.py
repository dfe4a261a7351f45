"""The objective on the spec's worked numbers (§8, TV1-TV3)."""

import pytest
import torch
from torch import Tensor

from remoe.moe.routing import Routing
from remoe.training.config import LossConfig, SparsityConfig
from remoe.training.counts import count
from remoe.training.objective import Objective

X = torch.tensor([[1, 0, -1], [0.5, 2, 1], [-1, 1, 0.5], [0, -0.5, 2]], dtype=torch.float64)
W = torch.tensor([[0.2, -0.4, 0.6], [-0.1, 0.3, 0.5], [0.7, 0.2, -0.3], [0.05, -0.25, 0.1]], dtype=torch.float64)


def relu_routing(hidden_TH: Tensor) -> Routing:
    logits_TE = hidden_TH @ W.T
    weights_TE = logits_TE.relu()
    return Routing(weights_TE, weights_TE > 0, logits_TE)


FIRST, SECOND = relu_routing(X), relu_routing(0.5 * X[:, (1, 2, 0)])


def objective(penalty: str = "sparsity_l1", z: float = 0.0, **sparsity: object) -> Objective:
    return Objective(
        losses=LossConfig(load_balancing_coef=0.01, router_z_coef=z),
        sparsity=SparsityConfig(**sparsity),
        penalty=penalty,
        top_k=1,
    )


@pytest.mark.parametrize(("mode", "expected"), [("paper", 2.43125), ("released", 4.8625)])
def test_l1_of_two_layers_is_a_mean_in_paper_mode_and_a_sum_in_released_mode(mode: str, expected: float):
    rule = objective(mode=mode)
    terms = rule.terms([FIRST, SECOND])
    assert terms["sparsity_l1"].tolist() == pytest.approx([3.06875, 1.79375], abs=1e-12)
    assert float(rule.penalties(terms, torch.tensor(1.0))) == pytest.approx(expected, abs=1e-12)


def test_l1_of_two_micro_batches_is_the_mean_of_theirs():
    # TV3c: loads of a micro-batch are not those of the batch
    rule = objective()
    halves = [rule.terms([relu_routing(part)])["sparsity_l1"] for part in X.split(2)]
    assert float(sum(0.5 * half for half in halves)) == pytest.approx(4.3375, abs=1e-12)


def test_loads_counted_elsewhere_replace_the_routings_own():
    rule = objective()
    own = rule.terms([FIRST])["sparsity_l1"]
    assert torch.equal(rule.terms([FIRST], count([FIRST]).loads_LE.double())["sparsity_l1"], own)
    assert float(rule.terms([FIRST], torch.zeros(1, 4))["sparsity_l1"]) == 0.0


def test_plain_l1_ignores_loads():
    assert float(objective(load_balanced=False).terms([FIRST])["sparsity_l1"]) == pytest.approx(1.43125, abs=1e-12)


def test_each_layer_can_have_its_own_coefficient():
    rule = objective()
    penalty = rule.penalties(rule.terms([FIRST, SECOND]), torch.tensor([2.0, 0.0], dtype=torch.float64))
    assert float(penalty) == pytest.approx(3.06875, abs=1e-12)


def test_load_balancing_is_summed_over_layers_and_weighed_by_its_coefficient():
    top1_TE = torch.nn.functional.one_hot(FIRST.logits_TE.argmax(1), 4).bool()
    routing = Routing(FIRST.logits_TE.softmax(1) * top1_TE, top1_TE, FIRST.logits_TE)
    rule = objective(penalty="load_balancing")
    terms = rule.terms([routing, routing])
    assert set(terms) == {"load_balancing"}
    assert float(rule.penalties(terms, None)) == pytest.approx(2 * 0.01 * 1.17026422730795, abs=1e-12)


def test_load_balancing_is_measured_for_every_router_and_inert_for_those_not_trained_with_it():
    weights_TE = FIRST.logits_TE.clone().requires_grad_()
    rule = objective(penalty="none")
    terms = rule.terms([FIRST._replace(logits_TE=weights_TE)])
    assert float(terms["load_balancing"]) > 1
    assert not terms["load_balancing"].requires_grad
    assert (rule.penalties(terms, None), rule.load_balancing_coef) == (0.0, 0.0)
    assert objective(penalty="load_balancing").load_balancing_coef == 0.01


def test_load_balancing_of_a_router_without_logits_is_that_of_its_choices():
    choice_T = torch.tensor([0, 0, 0, 1])
    map_TE = torch.nn.functional.one_hot(choice_T, 4).bool()
    terms = objective(penalty="none").terms([Routing(map_TE.double(), map_TE)])
    assert float(terms["load_balancing"]) == pytest.approx(4 * (0.75**2 + 0.25**2), abs=1e-12)


def test_router_z_joins_only_where_it_has_a_coefficient_and_logits():
    assert "router_z" not in objective().terms([FIRST])
    assert "router_z" not in objective(z=0.1).terms([FIRST._replace(logits_TE=None)])
    rule = objective(penalty="none", z=0.1)
    terms = rule.terms([FIRST, FIRST])
    expected = 2 * 0.1 * torch.logsumexp(FIRST.logits_TE, 1).square().mean()
    assert float(rule.penalties(terms, None)) == pytest.approx(float(expected), abs=1e-12)


def test_a_dense_model_has_no_penalty():
    rule = objective()
    assert rule.penalties(rule.terms([]), None) == 0.0


def test_counts_of_parts_add_up_exactly():
    parts = [count([relu_routing(part)]) for part in X.split(1)]
    total = parts[0]
    for part in parts[1:]:
        total = total.plus(part)
    assert all(torch.equal(a, b) for a, b in zip(total, count([FIRST]), strict=True))
    assert total.tokens_per_expert_LE.tolist() == [[1, 3, 2, 1]]
    assert (total.active_L.tolist(), total.total_L.tolist()) == ([7], [16])


def test_masked_tokens_are_not_counted():
    mask_T = torch.tensor([True, True, False, False])
    masked = FIRST._replace(routing_map_TE=FIRST.routing_map_TE & mask_T[:, None], token_mask_T=mask_T)
    counts = count([masked])
    assert (counts.tokens_L.tolist(), counts.active_L.tolist(), counts.without_expert_L.tolist()) == ([2], [3], [0])
