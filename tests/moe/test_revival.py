"""Starving layers and idle experts: what is measured, what pulls, and that it brings them back."""

import math

import pytest
import torch
from torch import nn

from remoe import ConfigError, MoE, MoEConfig, Routing
from remoe.moe.losses import sparsity_l1
from remoe.moe.revival import is_starving, revival
from remoe.moe.stats import density, tokens_per_expert, tokens_without_expert

LOGITS = torch.tensor([[-0.5, -2.0, -1.0, -3.0], [0.5, -2.0, -1.0, -0.25], [-4.0, -0.1, -0.5, -1.0]])


def routing_of(logits_TE, token_mask_T=None):
    weights_TE = logits_TE.relu()
    return Routing(weights_TE, weights_TE > 0, logits_TE, token_mask_T=token_mask_T)


def test_a_layer_starves_strictly_below_the_floor():
    routing = routing_of(LOGITS)  # 1 of 12 pairs; the target is 3 of 12
    assert density(routing).item() == pytest.approx(1 / 12)
    assert [bool(is_starving(routing, 1, floor)) for floor in (0.0, 0.33, 0.34, 1.0)] == [False, False, True, True]


def test_revival_is_the_distance_of_bare_tokens_to_their_nearest_gate_and_of_idle_experts_to_their_nearest_tokens():
    to_gates = (0.5 + 0.1) / 3
    to_experts = (0.1 + 0.5 + 0.25) / 4  # experts 1, 2, 3; ceil(0.5 * 1/4 * 3) = 1 token each
    assert revival(routing_of(LOGITS), 1, 0.5).item() == pytest.approx(to_gates + to_experts)
    assert revival(routing_of(LOGITS), 1, 0.0).item() == pytest.approx(to_experts)


def test_a_floor_of_more_tokens_lets_more_of_them_pull_at_an_idle_expert():
    routing = routing_of(LOGITS)
    to_gates = (0.5 + 0.1) / 3
    two_each = ((0.1 + 2.0) + (0.5 + 1.0) + (0.25 + 1.0)) / 8  # ceil(0.8 * 2/4 * 3) = 2
    assert revival(routing, 2, 0.8).item() == pytest.approx(to_gates + two_each)


def test_only_closed_gates_that_should_open_get_a_gradient():
    logits = LOGITS.clone().requires_grad_()
    revival(routing_of(logits), 1, 0.5).backward()
    pulled = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 0]], dtype=torch.bool)
    assert torch.equal(logits.grad != 0, pulled)
    assert (logits.grad <= 0).all()


def test_a_healthy_layer_is_left_alone():
    logits = torch.eye(4).requires_grad_()
    value = revival(routing_of(logits), 1, 0.5)
    value.backward()
    assert value.item() == 0
    assert logits.grad.abs().sum() == 0


def test_masked_tokens_neither_pull_nor_count():
    rows = torch.cat([LOGITS, torch.full((2, 4), -100.0)])
    mask = torch.tensor([True, True, True, False, False])
    masked, plain = revival(routing_of(rows, mask), 1, 0.5), revival(routing_of(LOGITS), 1, 0.5)
    assert masked.item() == pytest.approx(plain.item())
    none = rows.clone().requires_grad_()
    empty = revival(routing_of(none, torch.zeros(5, dtype=torch.bool)), 1, 0.5)
    empty.backward()
    assert empty.item() == 0
    assert none.grad.abs().sum() == 0


def test_no_tokens_at_all_give_zero():
    assert revival(routing_of(torch.zeros(0, 4)), 1, 0.5).item() == 0


def test_a_router_without_logits_is_refused():
    with pytest.raises(ConfigError, match=r"revival_coef to 0"):
        revival(routing_of(LOGITS)._replace(logits_TE=None), 1, 0.5)


def trained(layer, hidden, target, steps, revival_coef, floor=0.5):
    """A tiny training of one layer towards `target`, with an L1 term that is kept up by layers elsewhere."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    for _ in range(steps):
        out, routing = layer(hidden[None])
        loss = (out[0] - target).square().mean()
        if not is_starving(routing, 1, floor):
            loss = loss + 0.01 * sparsity_l1(routing, 1)
        loss = loss + revival_coef * revival(routing, 1, floor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer(hidden[None])[1]


@pytest.fixture
def task():
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 16, generator=draw)
    hidden[:, 0] = 2.0  # what all tokens share: how a whole layer can starve
    return hidden, torch.randn(64, 16, generator=draw)


def layer_with(weight):
    torch.manual_seed(0)
    layer = MoE(MoEConfig(hidden_size=16, intermediate_size=16, num_experts=4, init_std=0.1))
    layer.router.weight = nn.Parameter(weight)
    return layer


def test_a_dead_layer_stays_dead_without_revival_and_comes_back_with_it(task):
    weight = 0.02 * torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    weight[:, 0] = -0.2
    results = {coef: trained(layer_with(weight.clone()), *task, 150, coef) for coef in (0.0, 0.1)}
    assert tokens_without_expert(results[0.0]).item() == 64
    assert density(results[0.1]).item() >= 0.5 / 4
    assert tokens_without_expert(results[0.1]).item() < 16


def test_an_idle_expert_stays_idle_without_revival_and_comes_back_with_it(task):
    weight = 0.3 * torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    weight[3, 0] = -0.2
    results = {coef: trained(layer_with(weight.clone()), *task, 150, coef) for coef in (0.0, 0.1)}
    assert tokens_per_expert(results[0.0])[3].item() == 0
    assert tokens_per_expert(results[0.1])[3].item() > 0
    assert math.isfinite(results[0.1].weights_TE.sum().item())
