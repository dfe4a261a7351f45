"""SparseMixer-v2: the worked probabilities, gates and gradients (TV10), and what sampling does."""

import pytest
import torch

from remoe import RouterContext, build_router
from remoe.moe.routers.sparsemixer import best, heun_gate, near_softmax, sample

H = [[1, 0.98, 0.5, -0.2]]
P = [0.386588572385631, 0.378933605767948, 0.234477821846421, 0]


def near(jitter, dtype=torch.float64, logits=H):
    logits_TE = torch.tensor(logits, dtype=dtype, requires_grad=True)
    return logits_TE, near_softmax(logits_TE, jitter, torch.zeros(logits_TE.shape, dtype=torch.bool))


def test_a_gap_that_rounds_above_the_limit_drops_the_expert():
    # exactly .02 is not above 2 * .01, but 1 - .98 is 0.020000000000000018
    assert near(0.01)[1].tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_the_softmax_is_over_the_near_experts(dtype, tolerance):
    assert near(0.1, dtype)[1][0].tolist() == pytest.approx([0.50499983334, 0.49500016666, 0, 0], abs=tolerance)
    assert near(0.3, dtype)[1][0].tolist() == pytest.approx(P, abs=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("expert", "is_whole", "gate", "gradient"),
    [
        (0, True, 0.386588572385631, [0.474275696173, -0.292982803366, -0.181292892807, 0]),
        (1, True, 0.378933605767948, [-0.292982803366, 0.470685856375, -0.17770305301, 0]),
        (1, False, 0.126311201922649, [-0.292982803366, 0.470685856375, -0.17770305301, 0]),
    ],
)
def test_worked_gates_and_their_gradients(expert, is_whole, gate, gradient, dtype, tolerance):
    logits_TE, probs_TE = near(0.3, dtype)
    value = heun_gate(probs_TE, torch.tensor([is_whole]))[0, expert]
    assert value.item() == pytest.approx(gate, abs=tolerance)
    (d_logits,) = torch.autograd.grad(2.0 * value, logits_TE)
    assert d_logits[0].tolist() == pytest.approx(gradient, abs=tolerance)


def test_experts_are_drawn_by_probability_and_a_quarter_of_the_others_gates_is_whole():
    torch.manual_seed(0)
    chosen_T, is_whole_T = sample(torch.tensor([P]).expand(40_000, 4))
    assert (chosen_T.bincount(minlength=4) / 40_000).tolist() == pytest.approx(P, abs=0.01)
    assert is_whole_T[chosen_T == 0].all()
    assert is_whole_T[chosen_T > 0].double().mean() == pytest.approx(0.25, abs=0.01)


def test_the_mean_of_the_sampled_gate_estimates_what_the_rule_says():
    # whole in a quarter of the cases, a third else: (1/4 + 3/4 * 1/3) p = p / 2 for experts that are not the best
    torch.manual_seed(0)
    router = build_router("sparsemixer", 4, 4, 1, jitter=0.3)
    with torch.no_grad():
        router.weight.copy_(torch.diag(torch.tensor(H[0])))
    weights_TE = router(torch.ones(100_000, 4)).weights_TE
    second = weights_TE[:, 1][weights_TE[:, 1] > 0]
    assert second.mean().item() == pytest.approx(P[1] / 2, abs=0.003)


def test_evaluation_takes_the_best_with_its_whole_gate_and_draws_nothing():
    router = build_router("sparsemixer", 16, 8, 1, jitter=0.3, init_std=0.3).eval()
    hidden, state = torch.randn(32, 16), torch.get_rng_state()
    first = router(hidden)
    assert torch.equal(first.weights_TE, router(hidden).weights_TE)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.routing_map_TE.int().argmax(1), first.logits_TE.argmax(1))
    assert best(torch.tensor([P]))[1].all()


def test_the_second_expert_is_found_among_the_rest():
    router = build_router("sparsemixer", 4, 4, 2, jitter=0.3).eval()
    with torch.no_grad():
        router.weight.copy_(torch.diag(torch.tensor(H[0])))
    routing = router(torch.ones(1, 4))
    # without expert 0 the largest is .98 and .5 is within 2 * .3: p = softmax(.98, .5)
    assert routing.weights_TE[0].tolist() == pytest.approx([P[0], 0.617747874769, 0, 0], abs=1e-6)


@pytest.mark.parametrize("is_training", [True, False])
def test_each_token_has_exactly_k_experts_unless_masked(is_training):
    torch.manual_seed(0)
    router = build_router("sparsemixer", 16, 8, 3, jitter=0.3).train(is_training)
    mask = torch.arange(64) % 3 > 0
    routing = router(torch.randn(64, 16), RouterContext(token_mask_T=mask))
    assert routing.routing_map_TE.sum(1).tolist() == (3 * mask).tolist()


def test_equal_logits_stay_finite():
    _, probs_TE = near(0.01, logits=[[0.0, 0.0, 0.0], [-1.0, -1.0, -2.0]])
    assert probs_TE.tolist() == [pytest.approx([1 / 3] * 3), pytest.approx([0.5, 0.5, 0])]
