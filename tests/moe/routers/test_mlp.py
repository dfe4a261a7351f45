"""The router with one hidden layer."""

import pytest
import torch

from remoe import build_router

from .rmoe_vectors import assert_logits, count, mat, router_of, vec, x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_worked_logits(dtype):
    weights = {"up.weight": mat(100, 2, 3), "up.bias": vec(101, 2)}
    weights |= {"down.weight": 5 * mat(102, 4, 2), "down.bias": vec(103, 4)}
    expected = [0.17244756225518157, -1.2719197732568484, 0.8809840274424587, -0.06373125947391084]
    router = router_of("mlp", weights, dtype, mlp_size=2)
    assert_logits(router, x(1), expected)
    before = torch.nn.functional.linear(x(1).to(dtype), router.up.weight, router.up.bias)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert before[0].tolist() == pytest.approx([-0.22, 0.52], abs=tolerance)
    inner = torch.nn.functional.gelu(before)[0].tolist()
    assert inner == pytest.approx([-0.09084582701739279, 0.3632034704755776], abs=tolerance)


def logit_std(initial: str, **options) -> float:
    torch.manual_seed(0)
    hidden = torch.nn.functional.rms_norm(torch.randn(512, 128), (128,))
    return build_router("mlp", 128, 64, 2, initial=initial, **options)(hidden).logits_TE.std().item()


def test_matched_logits_start_as_wide_as_a_linear_routers():
    assert logit_std("matched", init_std=0.02) == pytest.approx(0.02 * 128**0.5, rel=0.05)
    assert logit_std("normal", init_std=0.02) < 0.2 * 0.02 * 128**0.5
    assert logit_std("library", init_std=0.02) == logit_std("library", init_std=0.5)


def test_library_values_have_the_bounds_of_torchs_linear():
    router = build_router("mlp", 64, 8, 2, mlp_size=256)
    for layer in (router.up, router.down):
        bound = layer.in_features**-0.5
        assert 0.95 * bound < layer.weight.abs().max().item() <= bound
        assert 0 < layer.bias.abs().max().item() <= bound


def test_parameter_counts_are_those_of_the_papers_tables():
    assert count("mlp", 352, 8) == 755_840
    assert count("mlp", 264, 6) == 15_725_437 - 15_293_725
    assert count("mlp", 352, 8, bias=False) == 8 * 256 * (352 + 16)
