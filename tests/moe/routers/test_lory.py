"""Lory: the worked segments and merge (TV11), its gradients, and what it does while text is generated."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from remoe import ConfigError, MoE, MoEConfig, RouterContext, build_router
from remoe.model import ReMoEConfig, ReMoEForCausalLM
from remoe.model.cache import KVCache
from remoe.moe.experts import MergedExperts
from remoe.moe.segments import cut

F64 = torch.float64
X = torch.tensor([[1, 0], [0, 1], [2, 1], [1, -1], [0.5, 0.5], [-1, 1]], dtype=F64)
E1, E2 = [0.377540668798, 0.622459331202], [0.679178699175, 0.320821300825]


def router_with(dtype=F64):
    router = build_router("lory", 2, 2, 1, segment_length=2)
    router.weight = nn.Parameter(torch.tensor([[1, -1], [0.5, 0.5]], dtype=dtype))
    return router


def starts(*places, size=6):
    return torch.isin(torch.arange(size), torch.tensor(places))


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-9), (torch.float32, 1e-5)])
def test_each_segment_uses_the_worked_routing_of_the_one_before(dtype, tolerance):
    routing = router_with(dtype)(X.to(dtype), RouterContext(sequence_start_T=starts(0)))
    expected = torch.tensor([E1, E1, E1, E1, E2, E2], dtype=dtype)
    torch.testing.assert_close(routing.weights_TE, expected, rtol=0, atol=tolerance)
    assert routing.merging.first_J.tolist() == [0, 2, 4]


def test_the_last_worked_routing_is_that_of_a_segment_which_follows():
    routing = router_with()(torch.cat((X, X[:2])), RouterContext(sequence_start_T=starts(0, size=8)))
    assert routing.weights_TE[6].tolist() == pytest.approx([0.222700138825, 0.777299861175], abs=1e-9)


def test_the_worked_matrices_are_merged_one_by_one():
    experts = MergedExperts(2, 2, 2).to(F64)
    theta = torch.tensor([[[1, 2], [3, 4]], [[0, 1], [-1, 2]]], dtype=F64)
    with torch.no_grad():
        experts.gate_up_proj.copy_(torch.cat((theta, 2 * theta), dim=1))
        experts.down_proj.copy_(3 * theta)
    routing = router_with()(X, RouterContext(sequence_start_T=starts(0)))
    merged = torch.tensor([[0.679178699175, 1.67917869918], [1.7167147967, 3.35835739835]], dtype=F64)
    expected = F.linear(F.silu(F.linear(X[4:], merged)) * F.linear(X[4:], 2 * merged), 3 * merged)
    out = experts(X, routing.merging, routing.weights_TE)
    torch.testing.assert_close(out[4:], expected, rtol=0, atol=1e-9)


def test_the_first_segment_gives_its_own_routing_no_gradient_but_the_next_one_does():
    router, hidden = router_with(), X.clone().requires_grad_()
    weights_TE = router(hidden, RouterContext(sequence_start_T=starts(0))).weights_TE
    first = torch.autograd.grad(weights_TE[:2, 0].sum(), [hidden, router.weight], retain_graph=True)
    assert all(gradient.abs().sum() == 0 for gradient in first)
    d_hidden, d_weight = torch.autograd.grad(weights_TE[2:4, 0].sum(), [hidden, router.weight])
    assert d_weight.abs().sum() > 0
    assert (d_hidden.abs().sum(1) > 0).tolist() == [True, True, False, False, False, False]


def test_sequences_do_not_see_each_other():
    both = torch.cat((X, X.flip(0)))
    routing = router_with()(both, RouterContext(sequence_start_T=starts(0, 6, size=12)))
    for rows, hidden in ((slice(0, 6), X), (slice(6, 12), X.flip(0))):
        alone = router_with()(hidden, RouterContext(sequence_start_T=starts(0)))
        torch.testing.assert_close(routing.weights_TE[rows], alone.weights_TE)


def test_padding_is_in_no_mean_and_moves_no_segment():
    padded = torch.cat((torch.full((1, 2), 9.0, dtype=F64), X, torch.full((2, 2), 9.0, dtype=F64)))
    mask = torch.tensor([False] + [True] * 6 + [False] * 2)
    context = RouterContext(sequence_start_T=starts(1, size=9), token_mask_T=mask)
    routing = router_with()(padded, context)
    alone = router_with()(X, RouterContext(sequence_start_T=starts(0)))
    torch.testing.assert_close(routing.weights_TE[1:7], alone.weights_TE)
    assert not routing.routing_map_TE[~mask].any()


def test_packed_documents_start_segments_of_their_own():
    segments = cut(starts(0, 3), None, 2)
    assert segments.first_J.tolist() == [0, 2, 3, 5]
    assert segments.is_opening_J.tolist() == [True, False, True, False]
    assert segments.segment_T.tolist() == [0, 0, 1, 2, 2, 3]


def layer_of(dtype=F64):
    torch.manual_seed(0)
    router = {"name": "lory", "segment_length": 4}
    return MoE(MoEConfig(hidden_size=8, intermediate_size=12, num_experts=3, router=router, init_std=0.5)).to(dtype)


def reference(layer, hidden_SH):
    """One sequence, straight from the definition."""
    parts = hidden_SH.split(4)
    shares = [F.linear(part.mean(0), layer.router.weight).softmax(0) for part in parts]
    shares = [shares[0].detach(), *shares[:-1]]
    outs = []
    for part, share_E in zip(parts, shares, strict=True):
        gate, up = torch.einsum("e,efh->fh", share_E, layer.experts.gate_up_proj).chunk(2)
        down = torch.einsum("e,ehf->hf", share_E, layer.experts.down_proj)
        outs.append(F.linear(F.silu(F.linear(part, gate)) * F.linear(part, up), down))
    return torch.cat(outs)


def test_the_layer_and_all_its_gradients_are_those_of_the_definition():
    layer = layer_of()
    hidden = torch.randn(2, 10, 8, dtype=F64, requires_grad=True)
    context = RouterContext(sequence_start_T=starts(0, 10, size=20))
    out, _ = layer(hidden, context)
    expected = torch.stack([reference(layer, row) for row in hidden])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    inputs = [hidden, *layer.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_bf16_autocast_routes_rounded_tokens_exactly_and_merges_in_bf16():
    layer = layer_of(torch.float32)
    hidden, context = torch.randn(1, 10, 8), RouterContext(sequence_start_T=starts(0, size=10))
    plain, routing = layer(hidden.bfloat16().float(), context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, same = layer(hidden, context)
    out.square().sum().backward()
    assert torch.equal(same.weights_TE, routing.weights_TE)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain, rtol=0.05, atol=0.05 * plain.abs().max().item())
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_masked_tokens_get_nothing():
    layer = layer_of()
    mask = torch.arange(10) < 7
    out, _ = layer(
        torch.randn(1, 10, 8, dtype=F64), RouterContext(sequence_start_T=starts(0, size=10), token_mask_T=mask)
    )
    assert (out[0].abs().sum(1) > 0).tolist() == mask.tolist()


def model_of(**options):
    router = {"name": "lory", "segment_length": 4, **options}
    config = ReMoEConfig(
        vocab_size=31, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=16, num_experts=3,
        router=router, init_std=0.4,
    )  # fmt: skip
    return ReMoEForCausalLM(config, seed=1).eval()


TOKENS = torch.randint(0, 31, (2, 15), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prompt_length", [4, 5, 8, 11])
def test_token_by_token_after_the_first_segment_equals_the_whole_at_once(prompt_length):
    model, cache = model_of(), KVCache(15)
    with torch.no_grad():
        whole = model(TOKENS).logits
        steps = [model(TOKENS[:, :prompt_length], cache=cache).logits]
        steps += [model(TOKENS[:, t : t + 1], cache=cache).logits for t in range(prompt_length, 14)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, :14], rtol=0, atol=1e-5)


def test_several_new_tokens_in_one_call_are_as_one_by_one():
    model, cache = model_of(), KVCache(15)
    with torch.no_grad():
        parts = [model(TOKENS[:, a:b], cache=cache).logits for a, b in ((0, 5), (5, 12), (12, 15))]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(TOKENS).logits, rtol=0, atol=1e-5)


def test_prompts_padded_on_the_left_go_on_as_without_padding():
    model = model_of()
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :3] = False
    both = model.generate(TOKENS[:, :8], 9, token_mask_BS=mask)
    assert both[0, 3:].tolist() == model.generate(TOKENS[:1, 3:8], 9)[0].tolist()
    assert both[1].tolist() == model.generate(TOKENS[1:, :8], 9)[0].tolist()


def test_prompt_routing_merges_once_for_the_prompt_and_all_that_follows():
    model, cache = model_of(generation="prompt"), KVCache(15)
    with torch.no_grad():
        first = model(TOKENS[:, :9], cache=cache).routings[0]
        later = [model(TOKENS[:, t : t + 1], cache=cache).routings[0] for t in range(9, 15)]
    assert first.merging.first_J.tolist() == [0, 9]
    for routing in later:
        assert torch.equal(routing.weights_TE, first.merging.weights_JE)


def test_prompt_routing_changes_nothing_without_a_cache():
    with torch.no_grad():
        assert torch.equal(model_of(generation="prompt")(TOKENS).logits, model_of()(TOKENS).logits)


def test_a_compiled_step_is_one_graph_with_equal_gradients():
    torch.compiler.reset()
    model = model_of().train()

    def gradients(run):
        logits = run(TOKENS).logits
        return torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()), list(model.parameters()))

    plain = gradients(model)
    compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    for mine, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.parametrize("context", [None, RouterContext()])
def test_it_says_that_it_needs_to_know_where_sequences_start(context):
    with pytest.raises(ConfigError, match="sequence_start_T"):
        router_with()(X, context)


@pytest.mark.parametrize("options", [{"segment_length": 0}, {"generation": "once"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="router option"):
        build_router("lory", 2, 2, 1, **options)
