"""HyperRouter: a frozen network writes a linear router."""

import pytest
import torch

from remoe import build_router

from .rmoe_vectors import assert_logits, count, mat, router_of, vec, x

WEIGHTS = {
    "embedding": x(2)[0],
    "up.weight": mat(104, 2, 3),
    "up.bias": vec(105, 2),
    "down.weight": mat(106, 16, 2),
    "down.bias": vec(107, 16),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_worked_logits(dtype):
    router = router_of("hyper", WEIGHTS, dtype, hyper_size=2)
    assert_logits(router, x(1), [0.2704, -0.8472, -0.0156, -0.0992])


def test_worked_row_that_the_network_writes():
    weight, bias = router_of("hyper", WEIGHTS, hyper_size=2).generated()
    row = torch.cat((weight[0], bias[:1]))
    torch.testing.assert_close(row, torch.tensor([0.408, -0.208, -0.23, 0.254], dtype=torch.float64))


def test_only_the_embedding_learns():
    router = router_of("hyper", WEIGHTS, hyper_size=2)
    assert [name for name, parameter in router.named_parameters() if parameter.requires_grad] == ["embedding"]
    router(x(1)).weights_TE.square().sum().backward()
    assert router.embedding.grad.abs().sum() > 0


def test_matched_routers_start_as_wide_as_a_linear_one():
    torch.manual_seed(0)
    weight, bias = build_router("hyper", 128, 64, 2, initial="matched", init_std=0.02).generated()
    assert weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert bias.std().item() == pytest.approx(0.02, rel=0.3)
    library, _ = build_router("hyper", 128, 64, 2).generated()
    assert library.std().item() > 0.1


def test_parameter_counts_are_those_of_the_papers_tables():
    assert count("hyper", 352, 8, dead_gate=True) == 12_383_232
    assert count("hyper", 264, 6, dead_gate=True) == 22_265_869 - 15_293_725
    assert count("hyper", 352, 8) == 12_383_232 - 45_184
