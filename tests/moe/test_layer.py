"""The layer against the worked forward and backward pass (TV7), its invariants and its edges."""

import pytest
import torch
from torch import nn

from remoe import ConfigError, MoE, MoEConfig, RouterContext, losses

F64 = torch.float64


def layer_of(hidden=16, intermediate=24, experts=8, top_k=2, router="relu", granularity=1, dtype=torch.float32):
    torch.manual_seed(0)
    config = MoEConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_experts=experts, top_k=top_k, router=router,
        granularity=granularity, init_std=0.3,
    )  # fmt: skip
    return MoE(config).to(dtype)


def open_gates(layer, is_open):
    """Make every gate of a ReLU layer open or closed for inputs whose first feature is 1."""
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, 0] = 1.0 if is_open else -1.0


def all_gradients(layer, x, context=None):
    out, routing = layer(x, context)
    torch.manual_seed(1)
    gradients = torch.autograd.grad((out * torch.randn_like(out)).sum(), [x, *layer.parameters()])
    return out, routing, gradients


def worked_layer():
    layer = layer_of(2, 2, 3, 1, dtype=F64)
    gate = [[[0.5, -0.2], [0.1, 0.3]], [[-0.4, 0.6], [0.2, -0.1]], [[0.3, 0.3], [-0.5, 0.2]]]
    up = [[[0.2, 0.4], [-0.3, 0.1]], [[0.7, -0.2], [0.1, 0.5]], [[-0.6, 0.2], [0.4, 0.4]]]
    down = [[[0.3, -0.1], [0.2, 0.5]], [[-0.2, 0.4], [0.6, 0.1]], [[0.1, 0.1], [-0.3, 0.2]]]
    layer.router.weight = nn.Parameter(torch.tensor([[0.6, 0.2], [-0.3, 0.8], [0.5, -0.4]], dtype=F64))
    gate_up = torch.cat((torch.tensor(gate, dtype=F64), torch.tensor(up, dtype=F64)), dim=1)
    layer.experts.gate_up_proj = nn.Parameter(gate_up)
    layer.experts.down_proj = nn.Parameter(torch.tensor(down, dtype=F64))
    return layer


def test_worked_layer_forward_and_every_gradient():
    layer = worked_layer()
    x = torch.tensor([[[1, 0.5], [-0.5, 1], [0.25, -1], [-1, -0.75]]], dtype=F64, requires_grad=True)
    c = torch.tensor([[1, -0.5], [0.25, 0.75], [-1, 0.5], [0.5, 0.5]], dtype=F64)
    out, routing = layer(x)
    expected = [
        [0.0172627915451, 0.00627161516646], [0.0422861893304, -0.17689451919], [0.00398270414848, -0.00121261705944],
        [0, 0],
    ]  # fmt: skip
    torch.testing.assert_close(out[0], torch.tensor(expected, dtype=F64), rtol=0, atol=1e-9)
    lm_loss = (c * out[0]).sum()
    assert lm_loss.item() == pytest.approx(-0.112561370776126, abs=1e-12)
    total = lm_loss + 0.05 * losses.sparsity_l1(routing, 1)
    assert total.item() == pytest.approx(-0.0708426207761259, abs=1e-12)
    parameters = [x, layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj]
    d_x, d_router, d_gate_up, d_down = torch.autograd.grad(total, parameters)
    close(d_x[0], [[0.0324610602397, 0.0505311703009], [0.256245517188, -0.248234635248],
                   [0.00249084999118, 0.00397190070397], [0, 0]])  # fmt: skip
    close(d_router, [[0.0408306160805, 0.0204153080402], [0.0977637093942, -0.0883376743289],
                     [-0.0130962010421, -0.0178082519249]])  # fmt: skip
    close(d_gate_up[:, :2], [
        [[0.0389083496709, 0.0194541748355], [0.0382022388212, 0.0191011194106]],
        [[0.0764826876519, -0.186721615941], [-0.0079469723982, 0.033494735497]],
        [[-0.0224501394441, -0.0312996339709], [0, 0]],
    ])  # fmt: skip
    close(d_gate_up[:, 2:], [
        [[0.0335265089663, 0.0167632544831], [-0.0344333106793, -0.0172166553396]],
        [[-0.102501017069, 0.210939794294], [0.0103055164827, -0.0135572662453]],
        [[0.0238869403445, -0.00280692772196], [0, 0]],
    ])  # fmt: skip
    # the spec prints .0252827… last; both tokens of expert 2 have C = ±(1, -.5), so row 2 is -row 1 / 2 = .0251827…
    close(d_down, [
        [[0.0670530179326, -0.0245952219138], [-0.0335265089663, 0.0122976109569]],
        [[-0.074952458153, -0.00680079161939], [-0.214881937396, -0.0302776482664]],
        [[-0.0595741990044, -0.0503654792439], [0.0297870995022, 0.0251827396219]],
    ])  # fmt: skip


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("is_open", [True, False])
def test_a_layer_with_all_or_no_gates_open_has_full_or_zero_gradients_never_missing_ones(is_open):
    layer = layer_of()
    open_gates(layer, is_open)
    x = torch.randn(2, 5, 16)
    x[..., 0] = 1.0
    out, routing, gradients = all_gradients(layer, x.requires_grad_())
    assert routing.routing_map_TE.all() if is_open else not routing.routing_map_TE.any()
    assert out.abs().max() > 0 if is_open else torch.equal(out, torch.zeros_like(out))
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert (gradient.abs().sum() > 0) == is_open


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 2), (7, 1, 1), (7, 4, 4), (1, 1, 1), (0, 4, 1)])
@pytest.mark.parametrize("router", ["relu", "topk"])
def test_degenerate_sizes_run_forward_and_backward(tokens, experts, top_k, router):
    layer = layer_of(experts=experts, top_k=top_k, router=router)
    out, routing, gradients = all_gradients(layer, torch.randn(1, tokens, 16, requires_grad=True))
    assert out.shape == (1, tokens, 16)
    assert routing.routing_map_TE.shape == (tokens, experts)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_an_idle_expert_gets_zero_gradient_and_the_others_theirs():
    layer = layer_of()
    with torch.no_grad():
        layer.router.weight[3] = 0  # logit 0 is not above 0
    _, routing, (_, d_router, d_gate_up, d_down) = all_gradients(layer, torch.randn(1, 64, 16, requires_grad=True))
    assert routing.routing_map_TE[:, 3].sum() == 0
    for gradient in (d_router, d_gate_up, d_down):
        assert torch.equal(gradient[3], torch.zeros_like(gradient[3]))
        assert (gradient.flatten(1).abs().sum(1) > 0).sum() == 7


@pytest.mark.parametrize("router", ["relu", "topk"])
def test_permuting_experts_changes_nothing(router):
    layer, permuted = layer_of(router=router, dtype=F64), layer_of(router=router, dtype=F64)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for parameter in permuted.parameters():
            parameter.copy_(parameter[order])
    x = torch.randn(2, 9, 16, dtype=F64)
    torch.testing.assert_close(layer(x)[0], permuted(x)[0], rtol=0, atol=1e-12)


def test_tokens_are_routed_one_by_one():
    layer, x = layer_of(dtype=F64), torch.randn(1, 9, 16, dtype=F64)
    alone = torch.cat([layer(x[:, t : t + 1])[0] for t in range(9)], dim=1)
    torch.testing.assert_close(layer(x)[0], alone, rtol=0, atol=1e-12)


def test_masked_tokens_pass_nothing_and_change_nothing_for_others():
    layer, x = layer_of(dtype=F64), torch.randn(1, 6, 16, dtype=F64)
    mask = torch.tensor([True, True, False, True, False, True])
    out, _ = layer(x, RouterContext(token_mask_T=mask))
    assert torch.equal(out[0, ~mask], torch.zeros(2, 16, dtype=F64))
    torch.testing.assert_close(out[0, mask], layer(x)[0][0, mask], rtol=0, atol=1e-12)


def test_relu_output_is_continuous_where_a_gate_opens_and_topk_jumps_where_it_switches():
    def jump(router, weight):
        layer = layer_of(hidden=2, experts=2, top_k=1, router=router, dtype=F64)
        layer.router.weight = nn.Parameter(torch.tensor(weight, dtype=F64))
        sides = [layer(torch.tensor([[[1.0, side]]], dtype=F64))[0] for side in (-1e-9, 1e-9)]
        return (sides[0] - sides[1]).abs().max().item()

    assert jump("relu", [[0.0, 1.0], [0.5, 0.0]]) < 1e-8
    assert jump("topk", [[0.5, 1.0], [0.5, -1.0]]) > 1e-4


def test_granularity_splits_experts_and_keeps_the_parameter_count():
    coarse, fine = layer_of(experts=8, top_k=1), layer_of(experts=8, top_k=1, granularity=4)
    assert fine.experts.gate_up_proj.shape == (32, 12, 16)
    assert fine.experts.down_proj.shape == (32, 16, 6)
    assert fine.router.weight.shape == (32, 16)
    experts = [sum(p.numel() for p in layer.experts.parameters()) for layer in (coarse, fine)]
    assert experts[0] == experts[1]
    assert fine.config.routed_top_k == 4


def test_granularity_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="granularity is 5, must divide intermediate_size = 3072"):
        MoEConfig(hidden_size=768, intermediate_size=3072, granularity=5)


def test_autocast_computes_experts_in_bf16_near_the_fp32_result():
    layer, x = layer_of(), torch.randn(1, 64, 16)
    exact, _ = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, routing = layer(x)
    assert routing.weights_TE.dtype == torch.float32
    error = (rounded.float() - exact).norm() / exact.norm()
    assert 0 < error < 0.02  # bf16 keeps 8 bits: 2^-8 a product, three in a row


def test_the_same_input_gives_the_same_bits():
    layer, x = layer_of(), torch.randn(4, 32, 16, requires_grad=True)
    first, second = all_gradients(layer, x), all_gradients(layer, x)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))


@pytest.mark.parametrize("router", ["relu", "topk"])
def test_the_whole_layer_compiles_into_one_graph_forward_and_backward(router):
    layer, x = layer_of(router=router), torch.randn(2, 9, 16, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out, _, gradients = all_gradients(layer, x)
    out_compiled, _, gradients_compiled = all_gradients(compiled, x)
    torch.testing.assert_close(out_compiled, out)
    for a, b in zip(gradients_compiled, gradients, strict=True):
        torch.testing.assert_close(a, b)
