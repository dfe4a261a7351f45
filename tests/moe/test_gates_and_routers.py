"""Routers against the worked vectors of the ReMoE spec (TV1, TV8), and what they do at their edges."""

import pytest
import torch
from torch import nn

from remoe import ConfigError, Router, RouterContext, build_router

X = torch.tensor([[1, 0, -1], [0.5, 2, 1], [-1, 1, 0.5], [0, -0.5, 2]], dtype=torch.float64)
W = torch.tensor([[0.2, -0.4, 0.6], [-0.1, 0.3, 0.5], [0.7, 0.2, -0.3], [0.05, -0.25, 0.1]], dtype=torch.float64)


def router_with(weight, name="relu", top_k=1, **options) -> Router:
    router = build_router(name, weight.shape[1], weight.shape[0], top_k, **options)
    router.weight = nn.Parameter(weight.clone())
    return router


BOTH = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])


@BOTH
def test_relu_router_gives_the_worked_gates_and_map(dtype, tolerance):
    routing = router_with(W.to(dtype))(X.to(dtype))
    expected = torch.tensor(
        [[-0.4, -0.6, 1, -0.05], [-0.1, 1.05, 0.45, -0.375], [-0.3, 0.65, -0.65, -0.25], [1.4, 0.85, -0.7, 0.325]],
        dtype=dtype,
    )
    torch.testing.assert_close(routing.logits_TE, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(routing.weights_TE, expected.relu(), rtol=0, atol=tolerance)
    assert routing.routing_map_TE.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 0, 0], [1, 1, 0, 1]]


def test_relu_router_leaves_experts_at_or_below_zero_inactive():
    routing = router_with(torch.tensor([[2.0], [0.0], [-1.0]]))(torch.tensor([[3.0]]))
    assert routing.weights_TE.tolist() == [[6.0, 0.0, 0.0]]
    assert routing.routing_map_TE.tolist() == [[True, False, False]]


@BOTH
def test_topk_router_keeps_the_worked_probabilities_of_its_picks(dtype, tolerance):
    probs = torch.tensor(
        [
            [0.137117816731, 0.112262573352, 0.55604016586, 0.194579444057],
            [0.150352922269, 0.474843533062, 0.260599656268, 0.114203888401],
            [0.187207411942, 0.484064013354, 0.131922833503, 0.196805741202],
            [0.490026972541, 0.282720968889, 0.060006952805, 0.167245105765],
        ],
        dtype=dtype,
    )
    one = router_with(W.to(dtype), "topk")(X.to(dtype))
    assert one.routing_map_TE.int().argmax(1).tolist() == [2, 1, 1, 0]
    torch.testing.assert_close(one.weights_TE, probs * one.routing_map_TE, rtol=0, atol=tolerance)
    two = router_with(W.to(dtype), "topk", top_k=2)(X.to(dtype))
    assert two.routing_map_TE.sum(0).tolist() == [1, 3, 2, 2]
    torch.testing.assert_close(two.weights_TE, probs * two.routing_map_TE, rtol=0, atol=tolerance)


def test_renormalised_topk_gates_sum_to_one():
    routing = router_with(W, "topk", top_k=2, renormalize=True)(X)
    torch.testing.assert_close(routing.weights_TE.sum(1), torch.ones(4, dtype=torch.float64))
    plain = router_with(W, "topk", top_k=2)(X)
    torch.testing.assert_close(
        routing.weights_TE[0, 2] / routing.weights_TE[0, 3], plain.weights_TE[0, 2] / plain.weights_TE[0, 3]
    )


@pytest.mark.parametrize("name", ["relu", "topk"])
def test_router_stays_in_fp32_under_autocast(name):
    router = build_router(name, 64, 8, 2)
    hidden = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    plain = router(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(hidden)
    assert routing.weights_TE.dtype == torch.float32
    assert torch.equal(routing.logits_TE, plain.logits_TE)


@pytest.mark.parametrize("name", ["relu", "topk"])
def test_masked_tokens_have_no_expert_and_weight_zero(name):
    mask = torch.tensor([True, False, True, False])
    routing = router_with(W, name)(X, RouterContext(token_mask_T=mask))
    assert not routing.routing_map_TE[~mask].any()
    assert routing.weights_TE[~mask].abs().sum() == 0
    assert torch.equal(routing.weights_TE[mask], router_with(W, name)(X).weights_TE[mask])


def test_a_relu_router_starts_with_about_half_of_its_gates_open():
    torch.manual_seed(0)
    routing = build_router("relu", 256, 8, 1)(torch.randn(4096, 256))
    assert 0.49 <= 1 - routing.routing_map_TE.double().mean().item() <= 0.51


@pytest.mark.parametrize(
    ("name", "top_k", "options", "message"),
    [
        ("rellu", 1, {}, "did you mean 'relu'"),
        ("relu", 9, {}, "top_k is 9, must be between 1 and 8"),
        ("relu", 0, {}, "top_k is 0"),
        ("topk", 1, {"renormalise": True}, "did you mean 'renormalize'"),
    ],
)
def test_a_router_that_cannot_be_built_says_what_is_allowed(name, top_k, options, message):
    with pytest.raises(ConfigError, match=message):
        build_router(name, 16, 8, top_k, **options)
