"""Top-K: the worked balance term and its gradient (TV8), and the nearly dense start."""

import pytest
import torch
from torch import nn

from remoe import ConfigError, build_router, losses
from remoe.config import from_dict
from remoe.training import TrainConfig
from remoe.training.objective import Objective

X = torch.tensor([[1, 0, -1], [0.5, 2, 1], [-1, 1, 0.5], [0, -0.5, 2]], dtype=torch.float64)
W = torch.tensor([[0.2, -0.4, 0.6], [-0.1, 0.3, 0.5], [0.7, 0.2, -0.3], [0.05, -0.25, 0.1]], dtype=torch.float64)


def router_with(top_k=1, weight=W, **options):
    router = build_router("topk", 3, 4, top_k, **options)
    router.weight = nn.Parameter(weight.clone())
    return router


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("top_k", "counts", "value"), [(1, [1, 2, 1, 0], 1.17026422730795), (2, [1, 3, 2, 2], 1.04864824564671)]
)
def test_worked_loads_and_balance_term(top_k, counts, value, dtype, tolerance):
    routing = router_with(top_k, W.to(dtype))(X.to(dtype))
    assert routing.routing_map_TE.sum(0).tolist() == counts
    assert losses.load_balancing(routing, top_k).item() == pytest.approx(value, abs=tolerance)


def test_the_warm_up_uses_more_experts_for_its_steps_and_none_after():
    router = router_with(warmup_steps=2, warmup_top_k=3)
    counts = []
    for step in (1, 2, 3, 4):
        counts.append(router(X).routing_map_TE.sum(1).tolist())
        router.after_step(torch.zeros(4), step)
    assert counts == [[3] * 4, [3] * 4, [1] * 4, [1] * 4]
    assert torch.equal(router(X).weights_TE, router_with()(X).weights_TE)


def test_warm_gates_are_those_of_topk_with_the_larger_k():
    for renormalize in (False, True):
        warm = router_with(warmup_steps=1, warmup_top_k=3, renormalize=renormalize)(X)
        assert torch.equal(warm.weights_TE, router_with(3, renormalize=renormalize)(X).weights_TE)
    router = router_with(warmup_steps=1, warmup_top_k=3, renormalize=True)
    router.after_step(torch.zeros(4), 1)
    torch.testing.assert_close(router(X).weights_TE.sum(1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(("num_experts", "warm"), [(8, 6), (32, 24), (128, 96), (1, 1)])
def test_the_warm_up_is_three_quarters_of_all_experts_unless_told(num_experts, warm):
    assert build_router("topk", 3, num_experts, 1, warmup_steps=100).warmup_top_k == warm


def test_the_warm_ups_progress_is_saved_and_plain_topk_has_no_buffer():
    router = router_with(warmup_steps=2)
    router.after_step(torch.zeros(4), 2)
    again = router_with(warmup_steps=2)
    again.load_state_dict(router.state_dict())
    assert again(X).routing_map_TE.sum(1).tolist() == [1] * 4
    assert list(router_with().state_dict()) == ["weight"]


def test_the_balance_term_is_1_at_even_load_also_while_warm():
    even = router_with(warmup_steps=1, warmup_top_k=4, weight=torch.zeros_like(W))
    config = from_dict(TrainConfig, {})
    objective = Objective(losses=config.losses, sparsity=config.sparsity, penalty="load_balancing", top_k=1)
    assert objective.terms([even(X)])["load_balancing"].tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("options", [{"warmup_steps": -1}, {"warmup_steps": 5, "warmup_top_k": 9}])
def test_a_warm_up_out_of_range_is_refused(options):
    with pytest.raises(ConfigError, match="router option warmup"):
        build_router("topk", 3, 4, 2, **options)
