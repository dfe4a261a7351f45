"""Facts about models with recurrent routers: the shared cell, and the state that rides from layer to layer."""

import copy

import pytest
import torch
import torch.nn.functional as F

from remoe.model import KVCache
from remoe.model.size import parameter_count
from remoe.model.weights import load_model, save_model
from remoe.moe import RouterContext

RMOE = {"name": "rmoe", "state_size": 8, "norm": "rms", "initial": "matched"}
RECURRENT_RELU = {"name": "recurrent_relu", "state_size": 8}
LSTM = RECURRENT_RELU | {"cell": "lstm", "residual_coef": 0.5, "bias": True}
EVERY = pytest.mark.parametrize("router", [RMOE, RECURRENT_RELU, LSTM], ids=["rmoe", "recurrent_relu", "lstm"])


def backward(model, tokens_BS):
    logits = model(tokens_BS).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), tokens_BS[:, 1:].flatten()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_the_model_owns_one_cell_and_each_layer_its_projector_and_head(build):
    model = build(router=RMOE)
    names = {name: list(p.shape) for name, p in model.named_parameters(remove_duplicate=False) if "router" in name}
    cell = {"weight_ih": [24, 8], "weight_hh": [24, 8], "bias_ih": [24], "bias_hh": [24]}
    expected = {f"model.router_cell.{name}": shape for name, shape in cell.items()}
    for layer in (0, 2):
        expected |= {f"model.layers.{layer}.mlp.router.{n}": s for n, s in (("projector", [8, 32]), ("head", [4, 8]))}
    assert names == expected
    assert {name for name in model.state_dict() if "router" in name} == expected.keys()
    assert all(model.model.layers[layer].mlp.router.cell is model.model.router_cell for layer in (0, 2))


def test_other_models_have_no_cell(build):
    assert build().model.router_cell is None
    assert build(router=RMOE, moe_layers="none").model.router_cell is None


@EVERY
@pytest.mark.parametrize("moe_layers", ["all", [0, 2], "none"])
def test_the_cell_is_counted_once(build, router, moe_layers):
    model = build(router=router, moe_layers=moe_layers)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert parameter_count(model.config).total == total
    if moe_layers == "all":
        cell = sum(parameter.numel() for parameter in model.model.router_cell.parameters())
        one_expert = 3 * 32 * 48
        assert parameter_count(model.config).active == total - 3 * 3 * one_expert
        assert cell > 0


def test_models_that_differ_in_the_router_share_all_else_and_residual_mode_relu_s_matrix_too(build):
    relu = dict(build(seed=7).named_parameters())
    ours = dict(build(seed=7, router=RECURRENT_RELU | {"input_residual": True}).named_parameters())
    assert relu.keys() < ours.keys()
    assert all(torch.equal(relu[name], ours[name]) for name in relu)


def test_residual_mode_starts_with_relu_routing_s_logits(build, tokens_BS):
    relu = build(seed=7)(tokens_BS).logits
    assert torch.equal(build(seed=7, router=RECURRENT_RELU | {"input_residual": True})(tokens_BS).logits, relu)


def test_the_cell_starts_as_its_router_says(build):
    cell = build(router=RMOE).model.router_cell
    assert 0.3 < cell.weight_hh.abs().max() <= 8**-0.5
    assert not cell.bias_hh.any()


@EVERY
def test_the_cell_s_gradient_is_the_sum_over_layers(build, tokens_BS, router):
    model = build(router=router, moe_layers="all")
    clones = copy.deepcopy(model)
    assert clones.model.layers[0].mlp.router.cell is clones.model.router_cell
    assert clones.model.router_cell is not model.model.router_cell
    for layer in clones.model.layers:
        del layer.mlp.router.cell
        layer.mlp.router.cell = copy.deepcopy(model.model.router_cell)
    gradients = backward(model, tokens_BS)
    clones.model.router_cell = None
    parts = backward(clones, tokens_BS)
    for name, _ in model.model.router_cell.named_parameters():
        per_layer = [parts[f"model.layers.{layer}.mlp.router.cell.{name}"] for layer in range(3)]
        assert all(part.any() for part in per_layer[1:])
        torch.testing.assert_close(gradients[f"model.router_cell.{name}"], sum(per_layer), rtol=1e-4, atol=1e-7)


@EVERY
def test_activation_checkpointing_changes_no_bit(build, tokens_BS, router):
    kept, recomputed = (build(router=router, moe_layers="all").train() for _ in range(2))
    recomputed.activation_checkpointing = True
    left, right = backward(kept, tokens_BS), backward(recomputed, tokens_BS)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert left["model.router_cell.weight_hh"].any()


@EVERY
def test_accumulated_halves_give_the_gradient_of_the_whole(build, tokens_BS, router):
    model = build(router=router, moe_layers="all")
    whole = backward(model, tokens_BS)
    model.zero_grad()
    for row_BS in tokens_BS.split(1):
        logits = model(row_BS).logits[:, :-1]
        (F.cross_entropy(logits.flatten(0, 1), row_BS[:, 1:].flatten()) / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-5)


@EVERY
def test_decoding_with_a_cache_equals_the_whole_forward(build, tokens_BS, router):
    model = build(router=router, moe_layers="all")
    whole = model(tokens_BS)
    cache = KVCache(tokens_BS.shape[1])
    steps = [model(part_BS, cache=cache) for part_BS in (tokens_BS[:, :4], *tokens_BS[:, 4:].split(1, dim=1))]
    logits = torch.cat([step.logits for step in steps], dim=1)
    torch.testing.assert_close(logits, whole.logits, rtol=0, atol=1e-4)
    states = torch.cat([step.routings[2].state_TP.unflatten(0, (2, -1)) for step in steps], dim=1)
    torch.testing.assert_close(states.flatten(0, 1), whole.routings[2].state_TP, rtol=0, atol=1e-5)


@EVERY
def test_a_dense_layer_between_hands_the_state_on_untouched(build, tokens_BS, router):
    model = build(router=router, moe_layers=[0, 2])
    seen = {}
    hooked = model.model.layers[2].mlp.router
    hooked.register_forward_pre_hook(lambda _, args: seen.update(context=args[1]))
    _, routings = model(tokens_BS)
    assert routings[1] is None
    assert torch.equal(seen["context"].state_TP, routings[0].state_TP)


@EVERY
def test_a_forward_pass_leaves_no_trace(build, tokens_BS, router):
    model = build(router=router)
    first = model(tokens_BS).logits
    model(tokens_BS.flip(0)[:, :3])
    assert torch.equal(model(tokens_BS).logits, first)


@EVERY
def test_saved_models_read_back_with_one_cell(build, tokens_BS, router, tmp_path):
    model = build(router=router)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.model.layers[0].mlp.router.cell is again.model.router_cell
    assert torch.equal(again(tokens_BS).logits, model(tokens_BS).logits)


@EVERY
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_compiles_to_one_graph(build, tokens_BS, router, checkpointing):
    torch.compiler.reset()
    model = build(router=router, moe_layers="all").train()
    model.activation_checkpointing = checkpointing
    expected = backward(model, tokens_BS)
    model.zero_grad()
    model.compile(fullgraph=True, backend="aot_eager")
    actual = backward(model, tokens_BS)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-5)


def test_masked_tokens_carry_states_but_no_expert(build, tokens_BS):
    mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    mask_BS[0, :3] = False
    _, routings = build(router=RECURRENT_RELU, moe_layers="all")(tokens_BS, mask_BS)
    assert not routings[2].routing_map_TE[:3].any()
    assert routings[2].state_TP.isfinite().all()


def test_shuffled_states_come_from_the_other_row(build, tokens_BS):
    shuffled = build(router=RECURRENT_RELU | {"passing": "shuffle"}, moe_layers="all")
    plain = build(router=RECURRENT_RELU, moe_layers="all")
    _, routings = shuffled(tokens_BS)
    router, seen = plain.model.layers[1].mlp.router, {}
    shuffled.model.layers[1].mlp.router.register_forward_pre_hook(lambda _, args: seen.update(hidden=args[0]))
    shuffled(tokens_BS)
    swapped_TP = routings[0].state_TP.unflatten(0, (2, 11)).flip(0).flatten(0, 1)
    expected = router(seen["hidden"], RouterContext(state_TP=swapped_TP))
    torch.testing.assert_close(routings[1].state_TP, expected.state_TP, rtol=0, atol=1e-6)
