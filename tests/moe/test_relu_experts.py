"""RMoE's character-model experts: worked numbers, dropout in training only, gradients, an MoE layer around them."""

import pytest
import torch
from torch.nn import functional as F

from remoe.errors import ConfigError
from remoe.moe import MoE, MoEConfig
from remoe.moe.dispatch import plan
from remoe.moe.relu_experts import ReLUExperts


def by_hand(experts, hidden_TH, routing_map_TE, weights_TE):
    out_TH = torch.zeros_like(hidden_TH)
    for expert in range(weights_TE.shape[1]):
        act = F.linear(hidden_TH, experts.up_proj[expert], experts.up_bias[expert]).relu()
        y_TH = F.linear(act, experts.down_proj[expert], experts.down_bias[expert])
        out_TH = out_TH + (weights_TE[:, expert] * routing_map_TE[:, expert])[:, None] * y_TH
    return out_TH


@pytest.fixture
def experts():
    torch.manual_seed(0)
    module = ReLUExperts(5, 6, 7).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_output_and_every_gradient_are_the_gated_sum_of_the_experts(experts, density):
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    routing_map = torch.rand(11, 5) < density
    weights = torch.rand(11, 5, dtype=torch.float64).masked_fill(~routing_map, 0).requires_grad_()
    outputs = experts(hidden, plan(routing_map), weights), by_hand(experts, hidden, routing_map, weights)
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(outputs[0])
    sources = (hidden, weights, *experts.parameters())
    for own, plain in zip(*(torch.autograd.grad((out * direction).sum(), sources) for out in outputs), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-11, atol=1e-11)


def test_active_expert_with_weight_0_still_gets_its_gate_gradient(experts):
    weights = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    routing_map = torch.ones(3, 5, dtype=torch.bool)
    experts(torch.randn(3, 6, dtype=torch.float64), plan(routing_map), weights).sum().backward()
    assert weights.grad.abs().min() > 0


def test_weights_start_uniform_over_the_packed_fan_and_biases_at_0():
    module = ReLUExperts(16, 24, 20)
    bound = (24 * 20) ** -0.5
    for weight in (module.up_proj, module.down_proj):
        assert bound * 0.98 < weight.abs().max() <= bound
    assert not module.up_bias.any()
    assert not module.down_bias.any()


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    experts = ReLUExperts(2, 4, 64, dropout=0.5)
    args = torch.randn(3, 4), plan(torch.ones(3, 2, dtype=torch.bool)), torch.ones(3, 2)
    assert not experts(*args).equal(experts(*args))
    experts.eval()
    assert experts(*args).equal(experts(*args))


def test_layer_with_relu_experts_routes_and_compiles_without_a_graph_break():
    layer = MoE(MoEConfig(hidden_size=8, intermediate_size=8, num_experts=4, experts="relu", init_std=0.5))
    hidden = torch.randn(2, 5, 8)
    expected, routing = layer(hidden)
    actual, _ = torch.compile(layer, fullgraph=True, backend="eager")(hidden)
    torch.testing.assert_close(actual, expected)
    assert routing.routing_map_TE.shape == (10, 4)


def test_dropout_of_swiglu_experts_is_refused():
    with pytest.raises(ConfigError, match=r"dropout is 0\.1, must be 0 with experts swiglu"):
        MoEConfig(dropout=0.1)
