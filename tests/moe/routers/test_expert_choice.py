"""Expert Choice: the worked picks (TV9), its balance, and evaluation with and without a view of later tokens."""

import pytest
import torch
from torch import nn

from remoe import ConfigError, RouterContext, build_router
from remoe.moe.evaluation import evaluated_as, other_evaluations

X = torch.tensor([[1, 0, -1], [0.5, 2, 1], [-1, 1, 0.5], [0, -0.5, 2]], dtype=torch.float64)
W = torch.tensor([[0.2, -0.4, 0.6], [-0.1, 0.3, 0.5], [0.7, 0.2, -0.3], [0.05, -0.25, 0.1]], dtype=torch.float64)


def router_with(weight=W, top_k=1, **options):
    router = build_router("expert_choice", weight.shape[1], weight.shape[0], top_k, **options)
    router.weight = nn.Parameter(weight.clone())
    return router


def tokens_of(routing):
    return [column.nonzero().flatten().tolist() for column in routing.routing_map_TE.T]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_experts_take_the_worked_tokens_with_their_probability_as_gate(dtype):
    routing = router_with(W.to(dtype))(X.to(dtype))
    assert tokens_of(routing) == [[3], [2], [0], [2]]
    expected = [0.490026972541, 0.484064013354, 0.55604016586, 0.196805741202]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert routing.weights_TE[routing.routing_map_TE].sort().values.tolist() == pytest.approx(
        sorted(expected), abs=tolerance
    )
    assert tokens_of(router_with(W.to(dtype), top_k=2)(X.to(dtype))) == [[2, 3], [1, 2], [0, 1], [0, 2]]


def test_every_expert_takes_the_same_number_of_tokens_that_are_not_masked():
    torch.manual_seed(0)
    router, hidden = build_router("expert_choice", 16, 8, 2), torch.randn(64, 16)
    assert router(hidden).routing_map_TE.sum(0).tolist() == [16] * 8
    mask = torch.arange(64) < 40
    routing = router(hidden, RouterContext(token_mask_T=mask))
    assert routing.routing_map_TE.sum(0).tolist() == [10] * 8
    assert torch.equal(routing.routing_map_TE[:40], router(hidden[:40]).routing_map_TE)


def test_of_equal_tokens_the_earlier_ones_are_taken():
    assert tokens_of(router_with(top_k=2)(X[:1].expand(4, 3))) == [[0, 1]] * 4


def test_causal_evaluation_of_a_token_does_not_depend_on_the_others():
    torch.manual_seed(0)
    router = build_router("expert_choice", 16, 4, 1, evaluation="causal", init_std=0.5).eval()
    hidden = torch.randn(32, 16)
    alone = torch.cat([router(row[None]).weights_TE for row in hidden])
    assert torch.equal(router(hidden).routing_map_TE, alone > 0)
    router.evaluation = "leaky"
    assert not torch.equal(router(hidden).routing_map_TE, alone > 0)


def test_with_a_cache_the_thresholds_decide():
    router = router_with().eval()
    causal = router_with(evaluation="causal").eval()
    assert torch.equal(router(X, RouterContext(cache={})).weights_TE, causal(X).weights_TE)


def test_thresholds_learnt_from_training_steps_keep_the_density_of_fresh_text():
    torch.manual_seed(0)
    router = build_router("expert_choice", 16, 8, 2, evaluation="causal", init_std=0.3, window=20)
    for _ in range(50):
        router.absorb(router.observe(router(torch.randn(512, 16))))
    assert router.eval()(torch.randn(8192, 16)).routing_map_TE.double().mean() == pytest.approx(2 / 8, abs=0.01)


def test_the_first_observation_replaces_the_start_and_later_ones_are_averaged():
    router = router_with(window=2)
    for value, expected in [(0.4, 0.4), (0.2, 0.3), (0.5, 0.4), (float("inf"), 0.4)]:
        router.absorb(torch.full((4,), value))
        assert router.thresholds.tolist() == pytest.approx([expected] * 4)


def test_other_ways_to_evaluate_are_found_and_put_back():
    model = nn.Sequential(router_with(), router_with())
    assert other_evaluations(model) == ("causal",)
    assert other_evaluations(nn.Linear(2, 2)) == ()
    with evaluated_as(model, "causal"):
        assert [router.evaluation for router in model] == ["causal", "causal"]
    assert [router.evaluation for router in model] == ["leaky", "leaky"]


def test_an_unknown_evaluation_is_refused():
    with pytest.raises(ConfigError, match="evaluation"):
        build_router("expert_choice", 4, 4, 1, evaluation="fair")
