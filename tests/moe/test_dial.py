"""The density dial: what a threshold does to ReLU gates, and how one forward pass finds thresholds for all layers."""

import pytest
import torch
from torch import nn

from remoe import RouterContext, build_router
from remoe.moe import dial, gates

LOGITS = torch.tensor([[2.0, 0.5, -0.25], [0.125, -1.0, 1.0]])


def plain_gate(logit: float, threshold: float) -> tuple[float, bool]:
    """Decision 0025, one number at a time."""
    if logit <= threshold:
        return 0.0, False
    return (logit if threshold >= 0 else logit - threshold), True


@pytest.mark.parametrize("threshold", [-2.0, -0.25, 0.0, 0.125, 0.5, 3.0])
def test_the_gate_is_the_plain_one(threshold):
    weights_TE, routing_map_TE = gates.relu(LOGITS, threshold)
    expected = [[plain_gate(logit, threshold) for logit in row] for row in LOGITS.tolist()]
    assert weights_TE.tolist() == [[weight for weight, _ in row] for row in expected]
    assert routing_map_TE.tolist() == [[is_active for _, is_active in row] for row in expected]


def test_a_threshold_above_0_leaves_the_gates_it_keeps_as_they_are():
    assert gates.relu(LOGITS, 0.25)[0].tolist() == [[2.0, 0.5, 0.0], [0.0, 0.0, 1.0]]


def test_a_threshold_below_0_opens_gates_at_0_and_raises_the_open_ones():
    assert gates.relu(LOGITS, -0.5)[0].tolist() == [[2.5, 1.0, 0.25], [0.625, 0.0, 1.5]]


@pytest.mark.parametrize("threshold", [-0.5, 0.25])
def test_gradients_reach_the_logits_of_active_experts_alone(threshold):
    logits_TE = LOGITS.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: gates.relu(logits, threshold)[0], logits_TE)
    weights_TE, routing_map_TE = gates.relu(logits_TE, threshold)
    (gradient_TE,) = torch.autograd.grad(weights_TE.sum(), logits_TE)
    assert torch.equal(gradient_TE != 0, routing_map_TE)


@pytest.mark.parametrize("name", ["relu", "recurrent_relu"])
def test_relu_routers_have_a_dial(name):
    torch.manual_seed(0)
    router = build_router(name, 8, 4, 1)
    hidden_TH = torch.randn(16, 8)
    trained = router(hidden_TH)
    dial.set_thresholds(router, [0.01])
    routing = router(hidden_TH)
    assert torch.equal(routing.routing_map_TE, trained.logits_TE > 0.01)
    assert 0 < routing.routing_map_TE.sum() < trained.routing_map_TE.sum()


def test_a_normalised_router_cuts_before_it_divides():
    router = build_router("relu", 1, 3, 1, normalize=True, eps=1e-12)
    router.weight = nn.Parameter(torch.tensor([[3.0], [4.0], [0.5]]))
    dial.set_thresholds(router, [1.0])
    routing = router(torch.ones(1, 1))
    length = ((3.0**2 + 4.0**2) / 3) ** 0.5
    torch.testing.assert_close(routing.weights_TE, torch.tensor([[3 / length, 4 / length, 0]]), rtol=0, atol=1e-6)
    assert routing.penalized_TE.tolist() == [[3.0, 4.0, 0.0]]


@pytest.mark.parametrize("name", ["topk", "rmoe", "hash", "loss_free"])
def test_other_routers_have_none(name):
    assert dial.dials(build_router(name, 8, 4, 1)) == []


@pytest.mark.parametrize(("num_pairs", "threshold"), [(1, 1.0), (2, 0.5), (4, 0.0), (5, -1.0), (0, 2.0), (6, -2.0)])
def test_the_threshold_leaves_as_many_pairs_as_wished(num_pairs, threshold):
    assert dial.threshold_for(LOGITS, num_pairs) == threshold
    assert int(LOGITS.gt(threshold).sum()) == num_pairs


class TwoLayers(nn.Module):
    """The second router reads what the first one let through."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.routers = nn.ModuleList(build_router("relu", 8, 8, 1, init_std=1.0) for _ in range(2))

    def forward(self, hidden_TH, context=None):
        first = self.routers[0](hidden_TH, context)
        return first, self.routers[1](first.weights_TE, context)


def test_one_pass_finds_thresholds_with_which_each_layer_has_the_wished_density():
    model, hidden_TH = TwoLayers(), torch.randn(100, 8)
    with dial.choosing_thresholds(model, [1.5, 3.0]):
        chosen = model(hidden_TH)
    again = model(hidden_TH)
    assert [int(routing.routing_map_TE.sum()) for routing in again] == [150, 300]
    assert all(torch.equal(a.weights_TE, b.weights_TE) for a, b in zip(chosen, again, strict=True))


def test_tokens_that_do_not_count_have_no_say():
    model, hidden_TH = TwoLayers(), torch.randn(100, 8)
    mask_T = torch.arange(100) < 40
    with dial.choosing_thresholds(model, [1.5, 3.0], mask_T):
        chosen = model(hidden_TH, RouterContext(token_mask_T=mask_T))
    assert [int(routing.routing_map_TE.sum()) for routing in chosen] == [60, 120]


def test_what_routers_return_is_recorded_while_the_context_is_open():
    model, hidden_TH = TwoLayers(), torch.randn(10, 8)
    with dial.recorded(model) as outputs:
        first, second = model(hidden_TH)
    model(hidden_TH)
    assert [output is routing for output, routing in zip(outputs, (first, second), strict=True)] == [True, True]


def test_thresholds_come_back_after_a_look_with_others():
    model = TwoLayers()
    dial.set_thresholds(model, [0.5, 0.25])
    with dial.thresholds_at(model, [1.0, 1.0]):
        assert dial.thresholds(model) == [1.0, 1.0]
    assert dial.thresholds(model) == [0.5, 0.25]
