"""What holds for every registered router, with default options; a new one is tested here without a change."""

import pytest
import torch

from remoe import ConfigError, MoE, MoEConfig, RouterContext, build_router
from remoe.moe import losses
from remoe.moe.initial import Constant, Normal, Orthogonal, Uniform, stated_values
from remoe.moe.routers import ROUTERS

HIDDEN_SIZE = 16
AMONG_TOKENS = {"expert_choice", "lory"}  # what becomes of a token depends on others of the call
every_router = pytest.mark.parametrize("name", sorted(ROUTERS))


def router_of(name, num_experts=8, top_k=2, dtype=torch.float32):
    torch.manual_seed(0)
    return build_router(name, HIDDEN_SIZE, num_experts, top_k).to(dtype).eval()


def hidden_of(num_tokens=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_tokens, HIDDEN_SIZE, generator=generator, dtype=torch.float64).to(dtype)


def context_of(num_tokens=12, **fields):
    index = torch.arange(num_tokens)
    known = {"token_ids_T": 7 * index + 3, "sequence_start_T": index % 6 == 0, "layer_index": 0}
    return RouterContext(**(known | fields))


def penalty_of(router, routing, top_k):
    """The auxiliary loss that the router is trained with."""
    if router.penalty == "none":
        return routing.weights_TE.sum() * 0
    loss = losses.sparsity_l1 if router.penalty == "sparsity_l1" else losses.load_balancing
    return loss(routing, top_k)


@every_router
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_routing_has_gates_in_fp32_or_wider_and_0_where_no_expert_works(name, dtype):
    router = router_of(name, dtype=dtype)
    routing = router(hidden_of(dtype=dtype), context_of())
    wide = torch.promote_types(dtype, torch.float32)
    assert routing.weights_TE.shape == routing.routing_map_TE.shape == (12, 8)
    assert routing.weights_TE.dtype == wide
    assert routing.routing_map_TE.dtype == torch.bool
    assert routing.weights_TE.isfinite().all()
    assert (routing.weights_TE[~routing.routing_map_TE] == 0).all()
    assert routing.routing_map_TE.any()
    assert routing.logits_TE is None or (routing.logits_TE.shape == (12, 8) and routing.logits_TE.dtype == wide)


@every_router
def test_it_says_its_penalty_and_the_width_of_its_state(name):
    router = router_of(name)
    routing = router(hidden_of(), context_of())
    assert router.penalty in ("sparsity_l1", "load_balancing", "none")
    assert router.penalty != "load_balancing" or routing.logits_TE is not None
    if router.state_size == 0:
        assert routing.state_TP is None
    else:
        assert routing.state_TP.shape == (12, router.state_size)


@every_router
def test_autocast_changes_no_bit(name):
    router = router_of(name)
    plain = router(hidden_of(), context_of())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(hidden_of(), context_of())
    assert torch.equal(routing.weights_TE, plain.weights_TE)
    assert torch.equal(routing.routing_map_TE, plain.routing_map_TE)
    assert plain.logits_TE is None or torch.equal(routing.logits_TE, plain.logits_TE)


@every_router
def test_masked_tokens_have_no_expert_and_change_no_other_token(name):
    router, hidden = router_of(name), hidden_of()
    mask = torch.arange(12) % 6 < 4
    context = context_of(token_mask_T=mask)
    routing = router(hidden, context)
    assert torch.equal(routing.token_mask_T, mask)
    assert not routing.routing_map_TE[~mask].any()
    assert (routing.weights_TE[~mask] == 0).all()
    other = router(torch.where(mask[:, None], hidden, 5 - hidden), context)
    torch.testing.assert_close(other.weights_TE, routing.weights_TE, rtol=0, atol=1e-6)
    assert penalty_of(router, other, 2).item() == pytest.approx(penalty_of(router, routing, 2).item(), abs=1e-6)


@every_router
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(0, 8, 2), (1, 8, 2), (5, 1, 1), (5, 4, 4)])
def test_edge_sizes_route_and_have_finite_gradients(name, num_tokens, num_experts, top_k):
    router = router_of(name, num_experts, top_k).train()
    hidden = hidden_of(num_tokens).requires_grad_()
    routing = router(hidden, context_of(num_tokens))
    assert routing.weights_TE.shape == (num_tokens, num_experts)
    loss = routing.weights_TE.square().sum() + penalty_of(router, routing, top_k)
    assert loss.isfinite()
    if loss.requires_grad:
        loss.backward()
    gradients = [p.grad for p in (hidden, *router.parameters()) if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


@every_router
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_output_of_its_layer_teaches_every_parameter_that_can_learn(name, top_k):
    torch.manual_seed(0)
    config = MoEConfig(
        hidden_size=HIDDEN_SIZE, intermediate_size=8, num_experts=4, top_k=top_k, router=name, init_std=0.2
    )
    layer, num_tokens = MoE(config), 600  # one sequence of several segments (Lory)
    state = torch.randn(num_tokens, layer.router.state_size) if layer.router.state_size else None
    starts = torch.arange(num_tokens) == 0
    context = context_of(num_tokens, state_TP=state, sequence_start_T=starts)
    out, _ = layer(hidden_of(num_tokens)[None], context)
    out.square().sum().backward()
    untaught = [
        parameter_name
        for parameter_name, parameter in layer.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().sum() > 0)
    ]
    assert untaught == []


@pytest.mark.parametrize("name", sorted(set(ROUTERS) - AMONG_TOKENS))
def test_a_token_is_routed_the_same_alone_and_among_others(name):
    router, hidden, context = router_of(name, dtype=torch.float64), hidden_of(dtype=torch.float64), context_of()
    together = router(hidden, context)
    for token in range(12):
        one = slice(token, token + 1)
        fields = {"token_ids_T": context.token_ids_T[one], "sequence_start_T": context.sequence_start_T[one]}
        alone = router(hidden[one], context_of(1, **fields))
        torch.testing.assert_close(alone.weights_TE, together.weights_TE[one], rtol=0, atol=1e-12)
        assert torch.equal(alone.routing_map_TE, together.routing_map_TE[one])


@every_router
def test_forward_and_backward_compile_into_one_graph(name):
    router = router_of(name)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    results = []
    for run in (router, compiled):
        hidden = hidden_of().requires_grad_()
        routing = run(hidden, context_of())
        loss = routing.weights_TE.square().sum() + penalty_of(router, routing, 2)
        gradient = torch.autograd.grad(loss, hidden)[0] if loss.requires_grad else torch.zeros(())
        results.append((routing.weights_TE, gradient))
    torch.testing.assert_close(results[1], results[0])


@every_router
def test_a_saved_router_routes_as_before(name):
    router, other = router_of(name), build_router(name, HIDDEN_SIZE, 8, 2).eval()
    other.load_state_dict(router.state_dict())
    routing, restored = router(hidden_of(), context_of()), other(hidden_of(), context_of())
    assert torch.equal(restored.weights_TE, routing.weights_TE)
    assert torch.equal(restored.routing_map_TE, routing.routing_map_TE)


@every_router
def test_first_values_are_finite_and_stated_only_for_parameters_as_known_laws(name):
    router, again = router_of(name), router_of(name)
    for (parameter_name, values), same in zip(router.named_parameters(), again.parameters(), strict=True):
        assert values.isfinite().all(), parameter_name
        assert torch.equal(values, same), parameter_name
    assert all(isinstance(law, Constant | Normal | Orthogonal | Uniform) for law in stated_values(router).values())


@every_router
@pytest.mark.parametrize("as_mapping", [False, True])
def test_a_layer_takes_it_by_name(name, as_mapping):
    router = {"name": name} if as_mapping else name
    config = MoEConfig(hidden_size=HIDDEN_SIZE, intermediate_size=8, num_experts=2, granularity=2, router=router)
    out, routing = MoE(config)(hidden_of(6)[None], context_of(6))
    assert out.shape == (1, 6, HIDDEN_SIZE)
    assert routing.weights_TE.shape == (6, 4)


@every_router
def test_an_option_that_it_does_not_have_is_named(name):
    with pytest.raises(ConfigError, match=f"router '{name}' has no option 'no_such_option'"):
        build_router(name, HIDDEN_SIZE, 8, 2, no_such_option=1)
