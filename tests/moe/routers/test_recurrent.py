"""Recurrent routing: exact reductions (RMoE §7.3), passing modes, rescue gradient (§7.6), invariants (§9.10)."""

import pytest
import torch
from torch import nn

from remoe import ConfigError, MoE, MoEConfig, RouterContext, build_router, losses
from remoe.moe import stats
from remoe.moe.cells import share_cell
from tests.moe.worked_rmoe import F64, fill, run

H, E, K, P, T = 12, 6, 2, 5, 14


def routers_of(name="rmoe", num_layers=3, hidden=H, experts=E, dtype=F64, **options):
    torch.manual_seed(0)
    options = {"state_size": P, "init_std": 0.5} | options
    routers = [build_router(name, hidden, experts, K, **options).to(dtype) for _ in range(num_layers)]
    share_cell(routers)
    return routers


def inputs_of(num_layers=3, tokens=T, hidden=H, dtype=F64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(tokens, hidden, dtype=dtype, generator=generator) for _ in range(num_layers)]


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.weights_TE, b.weights_TE)
        assert torch.equal(a.routing_map_TE, b.routing_map_TE)
        assert torch.equal(a.logits_TE, b.logits_TE)


# exact reductions


def relu_routers():
    torch.manual_seed(3)
    return [build_router("relu", H, E, K, init_std=0.5).double() for _ in range(3)]


def test_identity_cell_and_projector_are_remoe():
    plain = relu_routers()
    routers = routers_of(
        "recurrent_relu", cell="identity", state_size=H, norm="none", scale=1.0, initial="normal"
    )  # fmt: skip
    for router, relu in zip(routers, plain, strict=True):
        fill(router, projector=torch.eye(H), head=relu.weight)
    assert_same(run(routers, inputs_of()), [relu(x) for relu, x in zip(plain, inputs_of(), strict=True)])


@pytest.mark.parametrize("state_size", [1, 5, 16])
@pytest.mark.parametrize("cell", ["gru", "rnn", "lstm", "leaky"])
def test_residual_mode_starts_as_remoe_at_any_state_size(state_size, cell):
    plain = relu_routers()
    routers = routers_of("recurrent_relu", state_size=state_size, cell=cell, input_residual=True)
    for router, relu in zip(routers, plain, strict=True):
        assert not router.head.any()
        fill(router, weight=relu.weight)
    assert_same(run(routers, inputs_of()), [relu(x) for relu, x in zip(plain, inputs_of(), strict=True)])


def test_recurrent_relu_with_a_top_k_gate_is_rmoe():
    rmoe = routers_of("rmoe")
    ours = routers_of("recurrent_relu", gate="topk", norm="none", scale=1.0, initial="normal")
    assert ours[0].penalty == rmoe[0].penalty == "load_balancing"
    assert_same(run(ours, inputs_of()), run(rmoe, inputs_of()))


@pytest.mark.parametrize("name", ["rmoe", "recurrent_relu"])
@pytest.mark.parametrize("cell", ["gru", "rnn", "lstm", "leaky"])
def test_a_state_forced_to_zero_is_no_passing(name, cell):
    full, none = routers_of(name, cell=cell), routers_of(name, cell=cell, passing="none")
    forced = [router(x) for router, x in zip(full, inputs_of(), strict=True)]
    assert_same(run(none, inputs_of()), forced)


@pytest.mark.parametrize("cell", ["gru", "rnn", "lstm", "leaky", "identity"])
@pytest.mark.parametrize("residual_coef", [0.0, 0.5])
def test_no_state_is_a_state_of_zeros_to_the_bit(cell, residual_coef):
    router = routers_of(num_layers=1, cell=cell, residual_coef=residual_coef)[0]
    (x,) = inputs_of(1)
    zeros = router(x, RouterContext(state_TP=torch.zeros(T, router.state_size, dtype=F64)))
    assert_same([router(x)], [zeros])
    assert torch.equal(router(x).state_TP, zeros.state_TP)


def test_all_positive_logits_are_the_dense_weighted_sum_of_all_experts():
    torch.manual_seed(0)
    router = {"name": "recurrent_relu", "state_size": P, "bias": True}
    layer = MoE(MoEConfig(hidden_size=H, intermediate_size=8, num_experts=E, top_k=K, router=router, init_std=0.3))
    layer = layer.double()
    fill(layer.router, head_bias=torch.full((E,), 50.0))
    (x,) = inputs_of(1)
    out, routing = layer(x[None])
    assert routing.routing_map_TE.all()
    assert torch.equal(routing.weights_TE, routing.logits_TE)
    gate, up = torch.einsum("th,efh->tef", x, layer.experts.gate_up_proj).chunk(2, dim=-1)
    rows = torch.einsum("tef,ehf->teh", nn.functional.silu(gate) * up, layer.experts.down_proj)
    dense = (routing.weights_TE[..., None] * rows).sum(1)
    torch.testing.assert_close(out[0], dense, rtol=1e-12, atol=1e-12)


# passing


def test_detaching_changes_no_value():
    assert_same(run(routers_of(passing="detach"), inputs_of()), run(routers_of(), inputs_of()))


def test_with_one_layer_every_way_of_passing_is_the_same():
    full = run(routers_of(num_layers=1), inputs_of(1))
    start = torch.zeros(T, dtype=torch.bool)
    for passing in ("none", "detach", "gradient_only", "shuffle"):
        assert_same(run(routers_of(num_layers=1, passing=passing), inputs_of(1), sequence_start_T=start), full)


def starts(*places, tokens=T):
    start_T = torch.zeros(tokens, dtype=torch.bool)
    start_T[list(places)] = True
    return start_T


def test_shuffling_gives_each_token_the_state_at_its_place_of_another_sequence():
    router = routers_of(num_layers=1, passing="shuffle")[0]
    plain = routers_of(num_layers=1)[0]
    (x,) = inputs_of(1)
    state_TP = torch.randn(T, P, dtype=F64)
    shuffled = router(x, RouterContext(state_TP=state_TP, sequence_start_T=starts(0, 5, 10)))
    # sequences of 5, 5 and 4 tokens: the last place trades between the first two only
    source = [5, 6, 7, 8, 9, 10, 11, 12, 13, 4, 0, 1, 2, 3]
    assert torch.equal(shuffled.state_TP, plain(x, RouterContext(state_TP=state_TP[source])).state_TP)


def test_shuffling_trades_no_state_with_padding():
    router = routers_of(num_layers=1, passing="shuffle")[0]
    (x,) = inputs_of(1, tokens=8)
    mask_T = torch.tensor([False, True, True, True, True, True, True, True])
    context = RouterContext(sequence_start_T=starts(1, 4, tokens=8), token_mask_T=mask_T)
    state_TP = torch.randn(8, P, dtype=F64, requires_grad=True)
    out = router(x, context._replace(state_TP=state_TP))
    (gradient,) = torch.autograd.grad(out.state_TP[1:].sum(), state_TP)
    assert not gradient[0].any()
    assert gradient[1:].any(dim=1).all()


def test_shuffling_needs_sequence_starts():
    router = routers_of(num_layers=1, passing="shuffle")[0]
    with pytest.raises(ConfigError, match="sequence_start_T"):
        router(inputs_of(1)[0])


@pytest.mark.parametrize("detached", [False, True])
def test_detach_r_stops_the_gradient_of_the_logits_handed_on(detached):
    routers = routers_of(passing="none", residual_coef=0.5, detach_residual=detached)
    first, *rest = inputs_of()
    first.requires_grad_()
    last = run(routers, [first, *rest])[-1]
    (gradient,) = torch.autograd.grad(last.logits_TE.sum(), first, allow_unused=True, materialize_grads=True)
    assert bool(gradient.any()) is not detached
    plain = run(routers_of(passing="none", residual_coef=0.5), inputs_of())[-1]
    assert torch.equal(last.logits_TE, plain.logits_TE)


@pytest.mark.parametrize(("cell", "size"), [("gru", P), ("lstm", 2 * P), ("rnn", P), ("leaky", P)])
@pytest.mark.parametrize("residual_coef", [0.0, 1.0])
def test_the_state_s_width_is_the_router_s_state_size(cell, size, residual_coef):
    router = routers_of(num_layers=1, cell=cell, residual_coef=residual_coef)[0]
    state_TP = router(inputs_of(1)[0]).state_TP
    assert state_TP.shape == (T, router.state_size)
    assert router.state_size == size + (E if residual_coef else 0)


# the rescue gradient for tokens without an expert


def closed_first_layer(**options):
    """Two MoE layers with residual; no token has an expert in the first, all experts in the second."""
    torch.manual_seed(0)
    router = {"name": "recurrent_relu", "state_size": P, "bias": True} | options
    config = MoEConfig(hidden_size=H, intermediate_size=8, num_experts=E, top_k=K, router=router, init_std=0.3)
    layers = [MoE(config).double() for _ in range(2)]
    cell = share_cell(layer.router for layer in layers)
    for layer, bias in zip(layers, (-50.0, 50.0), strict=True):
        fill(layer.router, head_bias=torch.full((E,), bias))
    (x,) = inputs_of(1)
    closed_BSH, first = layers[0](x[None])
    assert not first.routing_map_TE.any()
    assert not closed_BSH.any()
    out_BSH, _ = layers[1](x[None] + closed_BSH, RouterContext(state_TP=first.state_TP))
    (out_BSH**2).sum().backward()
    return layers[0], cell


@pytest.mark.parametrize("passing", ["full", "gradient_only"])
def test_later_layers_train_the_projector_of_tokens_without_expert_through_the_state(passing):
    layer, cell = closed_first_layer(passing=passing)
    assert layer.router.projector.grad.abs().max() > 1e-6
    assert cell.weight_ih.grad.abs().max() > 1e-6
    assert not layer.router.head.grad.any()
    assert not layer.experts.down_proj.grad.any()


@pytest.mark.parametrize("passing", ["none", "detach"])
def test_without_a_gradient_through_the_state_nothing_reaches_that_projector(passing):
    layer, _ = closed_first_layer(passing=passing)
    assert not layer.router.projector.grad.any()


def test_tokens_without_expert_still_update_their_state():
    router = routers_of("recurrent_relu", num_layers=1, bias=True)[0]
    fill(router, head_bias=torch.full((E,), -50.0))
    routing = router(inputs_of(1)[0])
    assert stats.tokens_without_expert(routing) == T
    assert routing.state_TP.abs().min() > 0


# invariants


@pytest.mark.parametrize("name", ["rmoe", "recurrent_relu"])
@pytest.mark.parametrize("cell", ["gru", "lstm", "leaky"])
def test_tokens_do_not_see_each_other(name, cell):
    routers = routers_of(name, cell=cell, residual_coef=0.5)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    whole = run(routers, inputs_of())
    permuted = run(routers, [x[order] for x in inputs_of()])
    alone = [run(routers, [x[token : token + 1] for x in inputs_of()]) for token in range(T)]
    for layer in range(3):
        torch.testing.assert_close(permuted[layer].weights_TE, whole[layer].weights_TE[order], rtol=0, atol=1e-12)
        together = torch.cat([routings[layer].weights_TE for routings in alone])
        torch.testing.assert_close(together, whole[layer].weights_TE, rtol=0, atol=1e-12)


@pytest.mark.parametrize("passing", ["full", "shuffle"])
def test_a_later_token_changes_no_earlier_logit(passing):
    routers = routers_of(passing=passing)
    start_T = starts(0, 7)
    before = run(routers, inputs_of(), sequence_start_T=start_T)
    changed = [x.clone() for x in inputs_of()]
    for x in changed:
        x[[4, 11]] += 1  # the same place of both sequences
    after = run(routers, changed, sequence_start_T=start_T)
    earlier = [0, 1, 2, 3, 7, 8, 9, 10]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a.logits_TE[earlier], b.logits_TE[earlier])
        assert not torch.equal(a.logits_TE[[4, 11]], b.logits_TE[[4, 11]])


def test_the_cell_s_gradient_is_the_sum_over_layers_of_clones():
    def loss_of(routings):
        return sum((routing.weights_TE**2).sum() for routing in routings)

    shared = routers_of()
    loss_of(run(shared, inputs_of())).backward()
    clones = routers_of()
    for router in clones:
        cell = type(shared[0].cell)(P, P).double()
        cell.load_state_dict(shared[0].cell.state_dict())
        router.__dict__["cell"] = cell
    loss_of(run(clones, inputs_of())).backward()
    for name, parameter in shared[0].cell.named_parameters():
        parts = [router.cell.get_parameter(name).grad for router in clones]
        assert all(part.any() for part in parts[1:])
        torch.testing.assert_close(parameter.grad, sum(parts), rtol=1e-12, atol=1e-14)


def test_the_state_of_a_gru_stays_within_one():
    routers = routers_of(num_layers=20)
    for routing in run(routers, inputs_of(20)):
        assert routing.state_TP.abs().max() < 1


def test_a_gru_without_candidate_has_state_zero_and_logits_at_the_head_s_bias():
    routers = routers_of(bias=True)
    cell = routers[0].cell
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter[2 * P :] = 0
    for router in routers:
        fill(router, projector_bias=torch.zeros(P), head_bias=torch.arange(E, dtype=F64))
    for routing in run(routers, inputs_of()):
        assert not routing.state_TP.any()
        assert torch.equal(routing.logits_TE, torch.arange(E, dtype=F64).expand(T, E))


def test_the_balance_term_of_a_layer_reaches_its_own_and_earlier_routers():
    routers = routers_of()
    losses.load_balancing(run(routers, inputs_of())[2], K).backward()
    for part in (routers[2].head, routers[2].projector, routers[0].projector, routers[0].cell.weight_hh):
        assert part.grad.abs().max() > 1e-9
    assert routers[0].head.grad is None


@pytest.mark.parametrize("name", ["rmoe", "recurrent_relu"])
@pytest.mark.parametrize("cell", ["gru", "rnn", "lstm", "leaky"])
def test_gradients_are_exact(name, cell):
    routers = routers_of(name, num_layers=2, cell=cell, renormalize=True, residual_coef=0.5)

    def weights(first, second, state_TP):
        return run(routers, [first, second], state_TP)[1].weights_TE

    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, H, dtype=F64, generator=generator, requires_grad=True) for _ in range(2))
    state_TP = torch.randn(2, routers[0].state_size, dtype=F64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(weights, (first, second, state_TP))


@pytest.mark.parametrize("name", ["rmoe", "recurrent_relu"])
def test_bf16_weights_and_autocast_compute_in_fp32(name):
    router = routers_of(name, num_layers=1, dtype=torch.float32)[0]
    (x,) = inputs_of(1, dtype=torch.float32)
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(x).logits_TE, plain.logits_TE)
    low = router.bfloat16()(x.bfloat16())
    assert low.logits_TE.dtype == low.state_TP.dtype == torch.float32


@pytest.mark.parametrize("name", ["rmoe", "recurrent_relu"])
@pytest.mark.parametrize(
    "options", [{}, {"cell": "lstm", "residual_coef": 1.0}, {"passing": "shuffle"}, {"cell": "leaky"}]
)
def test_the_router_compiles_to_one_graph(name, options):
    torch.compiler.reset()
    routers = routers_of(name, dtype=torch.float32, **options)
    inputs = inputs_of(dtype=torch.float32)
    start_T = starts(0, 7)
    expected = run(routers, inputs, sequence_start_T=start_T)[2]
    compiled = [torch.compile(router, fullgraph=True, backend="aot_eager") for router in routers]
    state_TP = None
    for router, x in zip(compiled, inputs, strict=True):
        routing = router(x, RouterContext(state_TP=state_TP, sequence_start_T=start_T))
        state_TP = routing.state_TP
    torch.testing.assert_close(routing.weights_TE, expected.weights_TE, rtol=0, atol=1e-6)


# a user's mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "grü"}, "router.cell is 'grü'"),
        ({"passing": "never"}, "router.passing"),
        ({"state_size": 0}, "router.state_size is 0, must be at least 1"),
        ({"state_size": "wide"}, "state_size is 'wide'"),
        ({"state_sise": 3}, "did you mean 'state_size'"),
        ({"initial": "matched"}, "needs router.norm: rms"),
        ({"cell": "leaky", "projector": "shared"}, "must be hidden_size = 12"),
        ({"head": "cosine", "bias": True}, "router.bias is true"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build_router("rmoe", H, E, K, **options)


def test_a_state_of_another_router_is_refused():
    router = routers_of(num_layers=1)[0]
    with pytest.raises(ConfigError, match=r"state_TP has shape \[14, 3\], must be \[14, 5\]"):
        router(inputs_of(1)[0], RouterContext(state_TP=torch.zeros(T, 3)))
