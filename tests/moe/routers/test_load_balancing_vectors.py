"""The balance loss of RMoE's comparison against its worked vectors (RMoE spec §9.6)."""

import pytest
import torch

from remoe import Routing
from remoe.moe import gates, losses, stats

A = torch.tensor(
    [[1.5, -0.5, -2.5, 1.0], [-2.5, 1.0, -1.0, 2.5], [2.0, -0.8, -0.75, -0.7], [0.875, -0.25, -2.75, 1.625]],
    dtype=torch.float64,
)
B = A[:, [2, 3, 0, 1]]


def routing_of(logits):
    return Routing(*gates.topk_softmax(logits, 2, renormalize=True), logits)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_worked_selections_and_loss(dtype, atol):
    routing = routing_of(A.to(dtype))
    assert stats.tokens_per_expert(routing).tolist() == [3, 1, 0, 4]
    mean_probs = [0.42519051247947903, 0.09964712961894095, 0.02392184704523891, 0.4512405108563411]
    torch.testing.assert_close(
        routing.logits_TE.softmax(-1).mean(0), torch.tensor(mean_probs, dtype=dtype), rtol=0, atol=atol
    )
    assert losses.load_balancing(routing, 2).item() == pytest.approx(1.5900903552413712, abs=atol)


def test_other_codes_conventions_are_this_loss_times_or_over_k():
    """RMoE's large code is k times ours (shares of tokens, not of picks), its small base a k-th (P over T k)."""
    routing = routing_of(A)
    probs_E, counts_E = A.softmax(-1).mean(0), routing.routing_map_TE.double().sum(0)
    large_code, small_code = 4 * (counts_E / 4 * probs_E).sum(), 4 * (counts_E / 8 * probs_E / 2).sum()
    assert large_code.item() == pytest.approx(3.1801807104827424, abs=1e-9)
    assert small_code.item() == pytest.approx(0.7950451776206856, abs=1e-9)
    ours = losses.load_balancing(routing, 2).item()
    assert (2 * ours, ours / 2) == pytest.approx((large_code.item(), small_code.item()), abs=1e-12)


def test_pooling_layers_would_hide_the_imbalance_that_the_loss_a_layer_shows():
    per_layer = [losses.load_balancing(routing_of(logits), 2).item() for logits in (A, B)]
    assert per_layer == pytest.approx([1.5900903552413712] * 2, abs=1e-9)
    pooled = losses.load_balancing(routing_of(torch.cat((A, B))), 2).item()
    assert pooled == pytest.approx(1.025443820237641, abs=1e-9)


def test_both_orders_of_softmax_and_top_k_give_the_same_gates_and_gradients():
    logits = A.clone().requires_grad_()
    softmax_first, routing_map = gates.topk_softmax(logits, 2, renormalize=True)
    topk_first = logits.masked_fill(~routing_map, -torch.inf).softmax(-1)
    expected = torch.tensor([0.6224593312018546, 0, 0, 0.37754066879814546], dtype=torch.float64)
    for weights in (softmax_first, topk_first):
        torch.testing.assert_close(weights[0], expected, rtol=0, atol=1e-9)
    upstream = torch.arange(16, dtype=torch.float64).view(4, 4).sin()
    gradients = [torch.autograd.grad((w * upstream).sum(), logits)[0] for w in (softmax_first, topk_first)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)
