"""The frozen linear router."""

import pytest
import torch

from remoe import MoE, MoEConfig, build_router

from .rmoe_vectors import assert_logits, count, mat, router_of, vec, x

DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_linear_with_a_bias(dtype):
    router = router_of("random", {"weight": mat(90, 4, 3), "bias": vec(44, 4)}, dtype)
    assert_logits(router, x(1), (x(1) @ mat(90, 4, 3).T + vec(44, 4))[0].tolist())


def test_experts_and_hidden_states_learn_while_the_router_does_not():
    layer = MoE(MoEConfig(hidden_size=8, intermediate_size=8, num_experts=4, top_k=2, router="random"))
    hidden = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layer(hidden)[0].square().sum().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in layer.router.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.experts.parameters())
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize(("initial", "std", "bias_std"), [("library", 256**-0.5 / 3**0.5, 0.036), ("normal", 0.02, 0)])
def test_first_values_have_the_stated_width(initial, std, bias_std):
    torch.manual_seed(0)
    router = build_router("random", 256, 64, 2, initial=initial, init_std=0.02)
    assert router.weight.std().item() == pytest.approx(std, rel=0.05)
    assert router.bias.std().item() == pytest.approx(bias_std, rel=0.2)


def test_parameter_counts_are_those_of_the_papers_tables():
    assert count("random", 352, 8) == 45_184
    assert count("random", 264, 6) == 15_319_165 - 15_293_725
