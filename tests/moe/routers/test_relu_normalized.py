"""Normalised ReLU gates: on or off as before, a magnitude of their own, and an L1 term that cannot shrink it."""

import pytest
import torch
from torch import nn

from remoe import ConfigError, RouterContext, build_router
from remoe.moe.losses import sparsity_l1

X = torch.tensor([[1, 0, -1], [0.5, 2, 1], [-1, 1, 0.5], [0, -0.5, 2]], dtype=torch.float64)
W = torch.tensor([[0.2, -0.4, 0.6], [-0.1, 0.3, 0.5], [0.7, 0.2, -0.3], [0.05, -0.25, 0.1]], dtype=torch.float64)


def router_with(weight=W, **options):
    router = build_router("relu", weight.shape[1], weight.shape[0], 1, **options).double()
    router.weight = nn.Parameter(weight.clone())
    return router


def test_gates_have_root_mean_square_one_times_the_scale():
    router = router_with(normalize=True, eps=1e-12)
    with torch.no_grad():
        router.scale.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    R = torch.tensor([[0, 0, 1, 0], [0, 1.05, 0.45, 0], [0, 0.65, 0, 0], [1.4, 0.85, 0, 0.325]], dtype=torch.float64)
    expected = R / R.square().mean(1, keepdim=True).sqrt() * torch.tensor([1.0, 2.0, 3.0, 4.0])
    routing = router(X)
    torch.testing.assert_close(routing.weights_TE, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(routing.penalized_TE, R, rtol=0, atol=1e-12)
    assert torch.equal(routing.routing_map_TE, router_with()(X).routing_map_TE)


def test_shrinking_the_logits_leaves_normalised_gates_as_they_are():
    large, small = (router_with(W * size, normalize=True, eps=1e-12)(X) for size in (1.0, 0.01))
    torch.testing.assert_close(small.weights_TE, large.weights_TE, rtol=1e-6, atol=0)
    torch.testing.assert_close(sparsity_l1(small, 1), sparsity_l1(large, 1) * 0.01)


def test_the_l1_term_is_that_of_the_plain_router_and_leaves_the_scale_alone():
    plain, normalized = router_with(), router_with(normalize=True)
    for router in (plain, normalized):
        sparsity_l1(router(X), 1).backward()
    assert sparsity_l1(normalized(X), 1).item() == pytest.approx(3.06875)  # TV2
    torch.testing.assert_close(normalized.weight.grad, plain.weight.grad)
    assert normalized.scale.grad is None


def test_a_token_without_experts_has_gates_of_zero_and_finite_gradients():
    router = router_with(normalize=True)
    routing = router(torch.zeros(2, 3, dtype=torch.float64))
    assert routing.weights_TE.abs().sum() == 0
    routing.weights_TE.sum().backward()
    assert router.weight.grad.isfinite().all()


def test_gradients_are_exact():
    router = router_with(normalize=True)
    weights = (router.weight.detach().requires_grad_(), router.scale.detach().requires_grad_())

    def gates(weight, scale):
        return torch.func.functional_call(router, {"weight": weight, "scale": scale}, (X,)).weights_TE

    assert torch.autograd.gradcheck(gates, weights)


def test_masked_tokens_count_in_no_term():
    mask = torch.tensor([True, False, True, False])
    routing = router_with(normalize=True)(X, RouterContext(token_mask_T=mask))
    assert routing.weights_TE[~mask].abs().sum() == 0
    assert sparsity_l1(routing, 1).item() == pytest.approx(sparsity_l1(router_with()(X[mask]), 1).item())


def test_without_the_option_there_is_no_scale_and_nothing_is_normalised():
    router = build_router("relu", 3, 4, 1)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert router(X.float()).penalized_TE is None


def test_the_scale_starts_where_the_option_says():
    assert build_router("relu", 3, 4, 1, normalize=True, init_scale=0.5).scale.tolist() == [0.5] * 4
    with pytest.raises(ConfigError, match=r"eps is 0\.0, must be above 0"):
        build_router("relu", 3, 4, 1, normalize=True, eps=0)


def test_it_compiles_into_one_graph():
    router = build_router("relu", 16, 4, 1, normalize=True)
    hidden = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(router, fullgraph=True, backend="eager")(hidden)
    torch.testing.assert_close(compiled.weights_TE, router(hidden).weights_TE)
