"""The StableMoE router of RMoE's base code."""

import pytest
import torch

from remoe import build_router

from .rmoe_vectors import assert_logits, mat, router_of, x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_are_projections_on_unit_vectors(dtype):
    # the worked cosines of the cosine router (RMoE spec 9.5) times |x_1|
    cosines = [0.36927447293799814, 0.33333333333333337, -0.925476222741125, 0.15194743527951723]
    length = x(1).norm().item()
    assert_logits(router_of("stablemoe", {"weight": mat(90, 4, 3)}, dtype), x(1), [length * c for c in cosines])


def test_expert_vectors_start_orthogonal_with_the_base_codes_gain():
    weight = build_router("stablemoe", 32, 8, 2).weight
    torch.testing.assert_close(weight @ weight.T, 0.32**2 * torch.eye(8), rtol=0, atol=1e-6)


def test_it_has_the_parameters_of_a_linear_router():
    assert [tuple(p.shape) for p in build_router("stablemoe", 32, 8, 2).parameters()] == [(8, 32)]
