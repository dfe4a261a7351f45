"""The cosine router."""

import math

import pytest
import torch

from remoe import ConfigError, build_router

from .rmoe_vectors import assert_logits, count, mat, router_of, x

COSINES = [0.36927447293799814, 0.33333333333333337, -0.925476222741125, 0.15194743527951723]
PROBABILITIES = [0.4192777651366816, 0.37193898632165157, 0.005599615708897603, 0.20318363283276916]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("learn_temperature", [True, False])
def test_worked_cosines_and_probabilities(dtype, learn_temperature):
    weights = {"weight": mat(90, 4, 3)}
    if learn_temperature:
        weights["log_temperature"] = torch.tensor([0.3], dtype=torch.float64).log()
    router = router_of("cosine", weights, dtype, learn_temperature=learn_temperature)
    assert_logits(router, x(1), [cosine / 0.3 for cosine in COSINES])
    probs = router(x(1).to(dtype)).logits_TE.softmax(-1)
    atol = 1e-9 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(probs, torch.tensor([PROBABILITIES], dtype=dtype), rtol=0, atol=atol)


def test_lengths_of_tokens_and_experts_do_not_matter():
    router, longer = (router_of("cosine", {"weight": length * mat(90, 4, 3)}) for length in (1, 7))
    torch.testing.assert_close(router(x(1)).weights_TE, longer(100 * x(1)).weights_TE)


def test_the_temperature_learns_and_starts_where_told():
    router = build_router("cosine", 3, 4, 2, temperature=0.07)
    assert router.log_temperature.exp().item() == pytest.approx(0.07)
    router(x(1))[0].square().sum().backward()
    assert router.log_temperature.grad.abs().item() > 0
    with pytest.raises(ConfigError, match=r"temperature is 0\.0, must be above 0"):
        build_router("cosine", 3, 4, 2, temperature=0)


def test_a_token_of_zeros_has_equal_logits_and_finite_gradients():
    router, hidden = build_router("cosine", 3, 4, 2), torch.zeros(1, 3, requires_grad=True)
    routing = router(hidden)
    assert routing.logits_TE.tolist() == [[0.0] * 4]
    routing.weights_TE.square().sum().backward()
    assert hidden.grad.isfinite().all()
    assert router.weight.grad.isfinite().all()


def test_parameter_counts_are_those_of_the_papers_tables():
    assert count("cosine", 352, 8, learn_temperature=False) == 45_056
    assert count("cosine", 352, 8) == 45_056 + 8


def test_bf16_weights_still_route_in_fp32():
    router = build_router("cosine", 3, 4, 2).to(torch.bfloat16)
    logits = router(x(1).to(torch.bfloat16)).logits_TE
    assert logits.dtype == torch.float32
    assert logits.abs().max().item() <= 1 / math.exp(router.log_temperature.item()) * 1.01
