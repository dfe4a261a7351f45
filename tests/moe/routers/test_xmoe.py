"""XMoE's router, also in the form of RMoE's base code."""

import pytest
import torch

from remoe import build_router
from remoe.moe import gates

from .rmoe_vectors import assert_logits, count, mat, router_of, x

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
WEIGHTS = {"projection": mat(95, 2, 3), "embeddings": mat(99, 4, 2)}


def assert_probabilities(router, hidden, expected):
    dtype = router.projection.dtype
    probs = router(hidden.to(dtype)).logits_TE.softmax(-1)
    atol = 1e-9 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(probs, torch.tensor([expected], dtype=dtype), rtol=0, atol=atol)


@DTYPES
def test_worked_cosines_and_probabilities(dtype):
    weights = WEIGHTS | {"log_temperature": torch.tensor([0.3], dtype=torch.float64).log()}
    router = router_of("xmoe", weights, dtype, projection_size=2)
    cosines = [0.5665288228870651, 0.206010481049842, 0.9922778767136675, -0.9988681377244376]
    assert_logits(router, x(1), [cosine / 0.3 for cosine in cosines])
    probabilities = [0.1838318523889772, 0.055273505451517296, 0.7598986026705318, 0.0009960394889735678]
    assert_probabilities(router, x(1), probabilities)


@DTYPES
def test_worked_logits_and_probabilities_of_the_base_codes_form(dtype):
    router = router_of("xmoe", WEIGHTS, dtype, projection_size=2, form="base")
    logits = [0.28597082079265984, 0.10398938937914905, 0.5008792269599529, -0.5042058403189761]
    assert_logits(router, x(1), logits)
    probabilities = [0.28351664423846373, 0.23634424320513112, 0.35148928862141104, 0.12864982393499402]
    assert_probabilities(router, x(1), probabilities)


@DTYPES
def test_worked_cosines_on_a_routing_state(dtype):
    h_1 = torch.tensor([[0.20178390960865955, -0.13264725809922104]], dtype=torch.float64)
    weights = WEIGHTS | {"projection": mat(97, 2, 2)}
    options = {"projection_size": 2, "temperature": 1.0, "learn_temperature": False}
    cosines = [-0.7840411278028078, 0.09123917725135665, -0.9848121722831924, 0.9685951088688728]
    assert_logits(router_of("xmoe", weights, dtype, sizes=(2, 4), **options), h_1, cosines)


def test_logits_are_cosines_of_projections_over_the_temperature():
    router, hidden = build_router("xmoe", 32, 8, 2), torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    projected = torch.nn.functional.linear(hidden, router.projection)
    cosines = torch.cosine_similarity(projected[:, None], router.embeddings[None], dim=-1)
    torch.testing.assert_close(router(hidden).logits_TE, cosines / 0.3)
    assert torch.equal(router(hidden).weights_TE, gates.topk_softmax(router(hidden).logits_TE, 2, True)[0])


def test_parameter_counts_are_those_of_the_papers_tables():
    published = {"dead_gate": True, "learn_temperature": False}
    medium = {m: count("xmoe", 352, 8, projection_size=m, **published) for m in (8, 16, 32)}
    assert medium == {8: 68_736, 16: 92_288, 32: 139_392}
    assert count("xmoe", 352, 8, learn_temperature=False) == 47_104
    assert count("xmoe", 264, 6, **published) == 15_346_045 - 15_293_725
    assert count("xmoe", 352, 8, dead_gate=True) == 36_123_925 - 36_031_629  # with a temperature a layer


def test_the_dead_gate_changes_no_routing_and_never_learns():
    hidden = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    with_gate, without = build_router("xmoe", 16, 8, 2, dead_gate=True), build_router("xmoe", 16, 8, 2)
    without.load_state_dict(with_gate.state_dict(), strict=False)
    assert torch.equal(with_gate(hidden).weights_TE, without(hidden).weights_TE)
    assert not any(parameter.requires_grad for parameter in with_gate.dead_gate.parameters())
