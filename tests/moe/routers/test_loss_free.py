"""The loss-free router: worked scores, a bias that chooses but does not weigh, and loads that it evens out."""

import math

import pytest
import torch
from torch import nn

from remoe import ConfigError, build_router
from remoe.config import from_dict
from remoe.moe import stats
from remoe.training import TrainConfig, train

F64 = torch.float64
LOGITS = torch.tensor([[0.0, math.log(3), -math.log(3), math.log(4)]], dtype=F64)  # scores 1/2, 3/4, 1/4, 4/5


def router_with(load_bias=(0, 0, 0, 0), top_k=2, dtype=F64, **options):
    """Its logits are its inputs."""
    router = build_router("loss_free", 4, 4, top_k, **options).to(dtype)
    router.weight = nn.Parameter(torch.eye(4, dtype=dtype))
    router.load_bias.copy_(torch.tensor(load_bias, dtype=dtype))
    return router


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-9), (torch.float32, 1e-6)])
def test_gates_are_the_largest_scores_over_their_sum(dtype, tolerance):
    assert router_with(dtype=dtype)(LOGITS.to(dtype)).weights_TE[0].tolist() == pytest.approx(
        [0, 0.75 / 1.55, 0, 0.8 / 1.55], abs=tolerance
    )
    kept = router_with(dtype=dtype, renormalize=False, scale=2.5)(LOGITS.to(dtype))
    assert kept.weights_TE[0].tolist() == pytest.approx([0, 1.875, 0, 2.0], abs=tolerance)


def test_the_bias_chooses_experts_and_is_in_no_gate():
    routing = router_with((0.3, 0, 0, -0.5), renormalize=False)(LOGITS)  # .8, .75, .25, .3
    assert routing.routing_map_TE.tolist() == [[True, True, False, False]]
    assert routing.weights_TE[0].tolist() == pytest.approx([0.5, 0.75, 0, 0], abs=1e-9)


def test_one_expert_keeps_its_score_as_gate_so_that_the_router_learns():
    logits = LOGITS.clone().requires_grad_()
    weights_TE = router_with(top_k=1)(logits).weights_TE
    assert weights_TE[0].tolist() == pytest.approx([0, 0, 0, 0.8], abs=1e-9)
    (gradient,) = torch.autograd.grad(weights_TE.sum(), logits)
    assert gradient[0].tolist() == pytest.approx([0, 0, 0, 0.8 * 0.2], abs=1e-9)


def test_a_step_moves_the_bias_against_the_load_and_leaves_a_mean_load_alone():
    router = router_with(bias_step=0.001)
    router.after_step(torch.tensor([7, 4, 1, 4]), step=1)
    assert router.load_bias.tolist() == pytest.approx([-0.001, 0, 0.001, 0], abs=1e-12)


def test_skewed_loads_become_even_without_any_loss():
    torch.manual_seed(0)
    hidden = torch.randn(512, 16) + 1.0
    router = build_router("loss_free", 16, 8, 2, bias_step=0.01, init_std=0.3)
    before = stats.tokens_per_expert(router(hidden)).max().item()
    for step in range(1, 201):
        router.after_step(stats.tokens_per_expert(router(hidden)), step)
    assert before > 250  # of 128 each if even
    assert stats.tokens_per_expert(router(hidden)).tolist() == pytest.approx([128] * 8, abs=13)


def test_the_bias_is_saved_with_the_router():
    router = router_with()
    router.after_step(torch.tensor([4, 0, 0, 0]), step=1)
    other = build_router("loss_free", 4, 4, 2)
    other.load_state_dict(router.state_dict())
    assert other.load_bias.tolist() == pytest.approx([-0.001, 0.001, 0.001, 0.001])


def test_a_run_moves_the_bias_once_a_step_and_measures_a_balance_term_that_it_does_not_use(tmp_path):
    values = {
        "name": "loss-free",
        "model": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 8, "router": "loss_free"},
        "data": {"train": "embedded", "sequence_length": 16},
        "optimizer": {"warmup_steps": 1},
        "train": {"steps": 3, "batch_size": 2, "micro_batch_size": 1, "device": "cpu", "validation_batches": 1},
    }
    run = train(from_dict(TrainConfig, values), root=tmp_path)
    from remoe import load

    for layer in load(run.path).model.layers:
        steps = layer.mlp.router.load_bias / 0.001
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
        assert 0 < steps.abs().max() <= 3.001
    assert run.metrics()[-1]["load_balancing_coef"] == 0


def test_a_step_below_zero_is_refused():
    with pytest.raises(ConfigError, match="bias_step is -1"):
        build_router("loss_free", 4, 4, 2, bias_step=-1.0)
