"""Losses against the worked vectors of the ReMoE spec (TV2, TV3, TV8), value and gradient."""

import pytest
import torch

from remoe import Routing, losses
from tests.moe.test_gates_and_routers import W, X, router_with


def relu_routing(x, weight=W):
    return router_with(weight)(x)


def weight_gradient(loss, router):
    (gradient,) = torch.autograd.grad(loss, router.weight)
    return gradient


BOTH = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])


@BOTH
def test_worked_values_of_plain_and_load_balanced_l1(dtype, tolerance):
    routing = relu_routing(X.to(dtype), W.to(dtype))
    assert losses.sparsity_l1(routing, 1, load_balanced=False).item() == pytest.approx(1.43125, abs=tolerance)
    assert losses.sparsity_l1(routing, 1).item() == pytest.approx(3.06875, abs=tolerance)
    squared = (losses.expert_loads(routing) * 4).square() / 4  # f^2 in place of f, as the loads that give it
    assert losses.sparsity_l1(routing, 1, loads_E=squared).item() == pytest.approx(7.61875, abs=tolerance)


def test_worked_gradients_of_l1_reach_the_logits_the_router_and_its_input():
    router, x = router_with(W), X.clone().requires_grad_()
    routing = router(x)
    loss = 0.01 * losses.sparsity_l1(routing, 1)
    d_weight, d_x, d_logits = torch.autograd.grad(loss, (router.weight, x, routing.logits_TE))
    expected = [[0, 0, 0.005, 0], [0, 0.0075, 0.005, 0], [0, 0.0075, 0, 0], [0.0025, 0.0075, 0, 0.0025]]
    torch.testing.assert_close(d_logits, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    expected = [[0, -0.00125, 0.005], [-0.00375, 0.01875, 0.02625], [0.0075, 0.01, 0], [0, -0.00125, 0.005]]
    torch.testing.assert_close(d_weight, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    expected = [
        [0.0035, 0.001, -0.0015], [0.00275, 0.00325, 0.00225], [-0.00075, 0.00225, 0.00375],
        [-0.000125, 0.000625, 0.0055],
    ]  # fmt: skip
    torch.testing.assert_close(d_x, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_worked_gradient_of_plain_l1():
    router = router_with(W)
    gradient = weight_gradient(0.01 * losses.sparsity_l1(router(X), 1, load_balanced=False), router)
    expected = [[0, -0.00125, 0.005], [-0.00125, 0.00625, 0.00875], [0.00375, 0.005, 0], [0, -0.00125, 0.005]]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_two_layers_give_the_worked_mean_and_sum():
    first, second = relu_routing(X), relu_routing(0.5 * X[:, [1, 2, 0]])
    expected = [[0.5, 0.1, 0, 0.175], [0.15, 0.175, 0.725, 0], [0, 0, 0.55, 0], [0, 0.325, 0.025, 0]]
    torch.testing.assert_close(second.weights_TE, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert second.routing_map_TE.sum(0).tolist() == [2, 3, 3, 1]
    terms = [losses.sparsity_l1(routing, 1).item() for routing in (first, second)]
    assert terms[1] == pytest.approx(1.79375, abs=1e-12)
    assert sum(terms) / 2 == pytest.approx(2.43125, abs=1e-12)
    assert sum(terms) == pytest.approx(4.8625, abs=1e-12)


def test_micro_batch_loads_differ_from_batch_loads_as_worked():
    halves = [relu_routing(X[:2]), relu_routing(X[2:])]
    factors = [(losses.expert_loads(routing) * 4).tolist() for routing in halves]
    assert factors == [[0, 2, 4, 0], [2, 4, 0, 2]]
    assert sum(losses.sparsity_l1(routing, 1).item() for routing in halves) / 2 == pytest.approx(4.3375, abs=1e-12)


def test_given_loads_make_micro_batches_add_up_to_the_batch():
    loads = losses.expert_loads(relu_routing(X))
    halves = [losses.sparsity_l1(relu_routing(part), 1, loads_E=loads).item() for part in (X[:2], X[2:])]
    assert sum(halves) / 2 == pytest.approx(3.06875, abs=1e-12)


def test_loads_never_carry_a_gradient():
    loads = torch.full((4,), 0.25, dtype=torch.float64, requires_grad=True)
    loss = losses.sparsity_l1(relu_routing(X), 1, loads_E=loads)
    (gradient,) = torch.autograd.grad(loss, loads, allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize(("top_k", "value"), [(1, 1.17026422730795), (2, 1.04864824564671)])
def test_worked_load_balancing_loss(top_k, value):
    routing = router_with(W, "topk", top_k=top_k)(X)
    assert losses.load_balancing(routing, top_k).item() == pytest.approx(value, abs=1e-9)


def test_worked_gradient_of_load_balancing():
    router = router_with(W, "topk")
    gradient = weight_gradient(0.01 * losses.load_balancing(router(X), 1), router)
    expected = [
        [9.48809376227e-05, -3.34825457015e-04, -5.13928370281e-04],
        [-1.79277197911e-04, 2.06792030208e-03, 2.13686451385e-03],
        [9.16903198279e-05, -5.55990956864e-04, -4.31401814541e-04],
        [-7.29405953952e-06, -1.1771038882e-03, -1.19153432903e-03],
    ]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-13)


def test_load_balancing_is_one_at_uniform_probabilities_whatever_the_picks():
    logits = torch.zeros(6, 3)
    routing_map = torch.zeros(6, 3, dtype=torch.bool)
    routing_map[:, 0] = True
    assert losses.load_balancing(Routing(logits, routing_map, logits), 1).item() == pytest.approx(1, abs=1e-6)


def test_router_z_is_the_mean_squared_logsumexp():
    # RMoE spec 9.6
    logits = torch.tensor(
        [[1.5, -0.5, -2.5, 1.0], [-2.5, 1.0, -1.0, 2.5], [2.0, -0.8, -0.75, -0.7], [0.875, -0.25, -2.75, 1.625]],
        dtype=torch.float64,
    )
    routing = Routing(logits.relu(), logits > 0, logits)
    assert losses.router_z(routing).item() == pytest.approx(5.2367786152739315, abs=1e-9)


@pytest.mark.parametrize("name", ["relu", "topk"])
def test_masked_tokens_change_no_loss(name):
    from remoe import RouterContext

    router, mask = router_with(W, name), torch.tensor([True, True, True, False])
    masked, shorter = router(X, RouterContext(token_mask_T=mask)), router(X[:3])
    for loss in (lambda r: losses.sparsity_l1(r, 1), lambda r: losses.load_balancing(r, 1), losses.router_z):
        assert loss(masked).item() == pytest.approx(loss(shorter).item(), abs=1e-12)


def test_a_batch_of_masked_tokens_only_costs_nothing():
    from remoe import RouterContext

    routing = router_with(W)(X, RouterContext(token_mask_T=torch.zeros(4, dtype=torch.bool)))
    assert losses.sparsity_l1(routing, 1).item() == 0
    assert losses.router_z(routing).item() == 0
