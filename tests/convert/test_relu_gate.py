"""A ReLU gate fitted to a Top-K gate: exact in its loads, close in its choice."""

import pytest
import torch

from remoe import build_router
from remoe.convert.relu_gate import TopKTokens, fit_relu_gate, overlap

T, H, E, K = 4000, 16, 8, 2


def topk_tokens(common=0.0, seed=0):
    """Tokens routed by a renormalised softmax; `common` is how much of each logit all experts of a token share."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(T, H, generator=generator)
    weight_EH = torch.randn(E, H, generator=generator) + common * torch.randn(H, generator=generator)
    probs_TE = (hidden_TH @ weight_EH.T).softmax(-1)
    index_TK = probs_TE.topk(K).indices
    routing_map_TE = torch.zeros(T, E, dtype=torch.bool).scatter(1, index_TK, True)
    weights_TE = probs_TE * routing_map_TE
    return weight_EH, TopKTokens(hidden_TH, weights_TE / weights_TE.sum(1, keepdim=True), routing_map_TE)


def test_each_expert_keeps_its_tokens_and_the_gates_their_sum():
    weight_EH, tokens = topk_tokens()
    gate = fit_relu_gate(weight_EH, tokens)
    gates_TE = torch.relu(tokens.hidden_TH @ gate.weight.T + gate.bias)
    assert torch.equal((gates_TE > 0).sum(0), tokens.routing_map_TE.sum(0))
    assert (gates_TE > 0).sum() == T * K
    assert float(gates_TE.sum()) == pytest.approx(float(tokens.weights_TE.sum()), rel=1e-4)


def test_no_other_scale_brings_the_weights_closer():
    weight_EH, tokens = topk_tokens()
    gate = fit_relu_gate(weight_EH, tokens)
    weights_TE = gate(tokens.hidden_TH)

    def distance(factor):
        return float((factor * weights_TE - tokens.weights_TE).square().sum())

    assert distance(1.0) < min(distance(0.99), distance(1.01))
    assert distance(1.0) < 0.3 * float(tokens.weights_TE.square().sum())


def test_the_gate_is_router_relu_with_bias_and_normalised_gates():
    weight_EH, tokens = topk_tokens()
    gate = fit_relu_gate(weight_EH, tokens)
    router = build_router("relu", H, E, K, bias=True, normalize=True)
    router.load_state_dict(gate._asdict())
    torch.testing.assert_close(router(tokens.hidden_TH).weights_TE, gate(tokens.hidden_TH), rtol=0, atol=0)


def test_what_all_logits_of_a_token_share_makes_no_difference():
    weight_EH, tokens = topk_tokens()
    shared_EH, same = topk_tokens(common=10.0)
    assert torch.equal(same.routing_map_TE, tokens.routing_map_TE)
    gate, other = fit_relu_gate(weight_EH, tokens), fit_relu_gate(shared_EH, same)
    agree = overlap(other(tokens.hidden_TH) > 0, gate(tokens.hidden_TH) > 0)
    assert agree > 0.99


def test_the_choice_is_closer_to_top_k_than_that_of_one_threshold():
    weight_EH, tokens = topk_tokens(common=2.0)
    logits_TE = tokens.hidden_TH @ weight_EH.T
    plain_TE = logits_TE > logits_TE.flatten().sort(descending=True).values[T * K]
    fitted_TE = fit_relu_gate(weight_EH, tokens)(tokens.hidden_TH) > 0
    assert overlap(tokens.routing_map_TE, fitted_TE) > overlap(tokens.routing_map_TE, plain_TE) + 0.1


def test_a_line_that_a_linear_map_can_draw_is_drawn_exactly():
    generator = torch.Generator().manual_seed(0)
    direction_H = torch.randn(H, generator=generator)
    offsets_E = torch.tensor([2.0, 1.0, -1.0, -2.0])
    hidden_TH = torch.cat((torch.randn(T, H - 1, generator=generator), torch.ones(T, 1)), dim=1)
    weight_EH = direction_H + torch.cat((torch.zeros(4, H - 1), offsets_E[:, None]), dim=1)
    weights_TE = torch.tensor([0.75, 0.25, 0.0, 0.0]).expand(T, 4)  # always the first two experts
    gates_TE = fit_relu_gate(weight_EH, TopKTokens(hidden_TH, weights_TE, weights_TE > 0))(hidden_TH)
    assert torch.equal(gates_TE > 0, weights_TE > 0)


def test_an_expert_without_tokens_stays_closed_and_one_with_all_stays_open():
    weight_EH, tokens = topk_tokens()
    routing_map_TE = torch.zeros(T, E, dtype=torch.bool)
    routing_map_TE[:, 3] = True
    gates_TE = fit_relu_gate(weight_EH, TopKTokens(tokens.hidden_TH, routing_map_TE.float(), routing_map_TE))(
        tokens.hidden_TH
    )
    assert torch.equal(gates_TE > 0, routing_map_TE)


def test_all_experts_of_a_layer_may_be_on():
    weight_EH, tokens = topk_tokens()
    everything_TE = torch.ones(T, E, dtype=torch.bool)
    gates_TE = fit_relu_gate(weight_EH, TopKTokens(tokens.hidden_TH, everything_TE / E, everything_TE))(
        tokens.hidden_TH
    )
    assert (gates_TE > 0).all()
