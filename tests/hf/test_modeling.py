"""transformers' class computes what the native model computes, bit for bit on a CPU."""

import pytest
import torch
from torch import nn

from remoe import hf
from remoe.errors import ConfigError
from remoe.model import ReMoEConfig
from remoe.moe import losses
from remoe.moe.routers import ROUTERS, option_names
from tests.model.conftest import SMALL

pytestmark = pytest.mark.heavy

ROUTER_SETTINGS = {
    "relu": {},
    "relu, normalised": {"router": {"name": "relu", "normalize": True, "init_scale": 0.7}},
    "relu, granular": {"granularity": 2, "top_k": 2},
    "relu, more experts": {"thresholds": -0.3},
    "relu, fewer experts, normalised": {"thresholds": [0.1, 0.4], "router": {"name": "relu", "normalize": True}},
    "topk": {"router": "topk", "top_k": 2},
    "topk, renormalised": {"router": {"name": "topk", "renormalize": True, "bias": True}, "top_k": 2},
    "topk, warming up": {"router": {"name": "topk", "warmup_steps": 3}},
    "rmoe": {"router": "rmoe", "top_k": 2},
    "rmoe, rnn": {"router": {"name": "rmoe", "cell": "rnn", "bias": True, "initial": "library"}},
    "rmoe, lstm": {"router": {"name": "rmoe", "cell": "lstm", "cell_bias": False}},
    "rmoe, shared projector": {"router": {"name": "rmoe", "projector": "shared", "state_size": 24}},
    "rmoe, leaky": {"router": {"name": "rmoe", "cell": "leaky", "learned_leak": "vector"}},
    "rmoe, identity": {"router": {"name": "rmoe", "cell": "identity"}},
    "rmoe, cosine": {"router": {"name": "rmoe", "head": "cosine"}},
    "rmoe, r-alpha": {"router": {"name": "rmoe", "residual_coef": 0.4, "residual_mode": "one_step"}},
    "rmoe, detached": {"router": {"name": "rmoe", "passing": "detach", "residual_coef": 0.4, "detach_residual": True}},
    "rmoe, gradient alone": {"router": {"name": "rmoe", "passing": "gradient_only"}},
    "rmoe, no passing": {"router": {"name": "rmoe", "passing": "none"}},
    "recurrent_relu": {"router": "recurrent_relu"},
    "recurrent_relu, residual": {"router": {"name": "recurrent_relu", "input_residual": True}},
    "dense": {"moe_layers": "none"},
    "tied": {"tie_embeddings": True},
    "one head group": {"num_kv_heads": None, "head_size": 6},
}
each_router = pytest.mark.parametrize("settings", ROUTER_SETTINGS.values(), ids=ROUTER_SETTINGS.keys())


@each_router
@pytest.mark.parametrize("experts", ["remoe", "eager"])
def test_logits_equal_the_native_models_to_the_last_bit(build, tokens_BS, settings, experts):
    model = build(**settings)
    other = hf.from_native(model)
    other.set_experts_implementation(experts)
    with torch.no_grad():
        assert other(tokens_BS).logits.equal(model(tokens_BS).logits)


@each_router
def test_logits_under_autocast_equal_the_native_models_too(build, tokens_BS, settings):
    model = build(**settings)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert hf.from_native(model)(tokens_BS).logits.equal(model(tokens_BS).logits)


@each_router
def test_padding_is_neither_attended_to_nor_routed_nor_counted(build, tokens_BS, settings):
    model = build(**settings)
    other = hf.from_native(model)
    mask_BS = torch.ones_like(tokens_BS)
    mask_BS[0, :4] = 0
    with torch.no_grad():
        output, expected = other(tokens_BS, attention_mask=mask_BS), model(tokens_BS, mask_BS)
    assert output.logits[mask_BS.bool()].equal(expected.logits[mask_BS.bool()])
    counts = [routing.routing_map_TE.sum(0) for routing in expected.routings if routing is not None]
    assert output.num_tokens == 18
    assert not counts or output.tokens_per_expert.equal(torch.stack(counts))


@each_router
@pytest.mark.parametrize("experts", ["remoe", "eager"])
def test_loss_and_gradients_are_those_of_native_training(build, tokens_BS, settings, experts):
    model = build(**settings).train()
    other = hf.from_native(build(**settings)).train()
    other.set_experts_implementation(experts)
    other.sparsity_coef = torch.tensor([0.3, 0.1])
    mask_BS = torch.ones_like(tokens_BS)
    mask_BS[0, :4] = 0
    labels_BS = tokens_BS.clone()
    labels_BS[0, :5] = -100  # padding, and what it would predict
    loss = other(tokens_BS, attention_mask=mask_BS, labels=labels_BS).loss
    loss.backward()
    expected = native_loss(model, tokens_BS, mask_BS, labels_BS, other.config, other.sparsity_coef)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    gradients = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        expected_gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name].grad, expected_gradient, rtol=1e-4, atol=1e-6, msg=name)


def native_loss(model, tokens_BS, mask_BS, labels_BS, config, sparsity_coef):
    output = model(tokens_BS, mask_BS)
    lm_loss = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten())
    routings = [routing for routing in output.routings if routing is not None]
    if not routings:
        return lm_loss
    if config.is_relu_gated:
        terms = torch.stack([losses.sparsity_l1(routing, config.routed_top_k) for routing in routings])
        return lm_loss + (sparsity_coef * terms).mean()
    per_token = [routing.routing_map_TE.sum() // 18 for routing in routings]
    terms = [losses.load_balancing(routing, k) for routing, k in zip(routings, per_token, strict=True)]
    return lm_loss + config.router_aux_loss_coef * torch.stack(terms).sum()


def test_plain_l1_leaves_the_loads_out(build, tokens_BS):
    model = build()
    other = hf.from_native(model)
    other.config.load_balanced = False
    other = hf.ReMoEForCausalLM(other.config)
    other.load_state_dict(model.state_dict())
    other.sparsity_coef = 1.0
    terms = [losses.sparsity_l1(r, 1, load_balanced=False) for r in model(tokens_BS).routings if r is not None]
    torch.testing.assert_close(other(tokens_BS).aux_loss, torch.stack(terms).mean())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("router", ["relu", "recurrent_relu"])
def test_gradient_checkpointing_changes_no_gradient(build, tokens_BS, router, use_reentrant):
    gradients = []
    for is_on in (False, True):
        model = hf.from_native(build(router=router)).train()
        model.sparsity_coef = 0.2
        if is_on:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(tokens_BS, labels=tokens_BS).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_a_layer_in_which_no_expert_is_active_leaves_gradients_of_zero(build, tokens_BS):
    model = hf.from_native(build(moe_layers="all")).train()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.weight.zero_()
    output = model(tokens_BS, labels=tokens_BS)
    output.loss.backward()
    assert output.tokens_per_expert.sum() == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.model.layers[0].mlp.experts.down_proj.grad.count_nonzero() == 0


def test_a_cap_on_active_experts_keeps_the_largest_gates(build, tokens_BS):
    model = build(moe_layers="all")
    config = hf.from_native(model).config
    config.max_active_experts = 2
    capped = hf.ReMoEForCausalLM(config).eval()
    capped.load_state_dict(model.state_dict())
    hidden_TH = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    weights_TE = model.model.layers[0].mlp.router(hidden_TH).weights_TE
    routing = capped.model.layers[0].mlp.router(hidden_TH)
    assert routing.top_k_weights.equal(weights_TE.topk(2).values)
    assert config.num_experts_per_tok == 2
    assert capped(tokens_BS).logits.shape == (2, 11, 61)


def test_router_logits_hidden_states_and_attentions_come_out_on_request(build, tokens_BS):
    model = hf.from_native(build())
    model.set_attn_implementation("eager")
    output = model(tokens_BS, output_router_logits=True, output_hidden_states=True, output_attentions=True)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(22, 4), (22, 4)]
    assert len(output.hidden_states) == 4
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 11))
    torch.testing.assert_close(output.logits, build()(tokens_BS).logits, rtol=1e-5, atol=1e-5)


def test_every_router_is_either_in_transformers_with_all_options_or_refused_by_name():
    for name in ROUTERS:
        config = ReMoEConfig(**SMALL | {"router": name})
        if name not in ("relu", "topk", "rmoe", "recurrent_relu"):
            with pytest.raises(ConfigError, match=f"'{name}', must be one of relu, topk, rmoe, recurrent_relu"):
                hf.native.config_from_native(config)
            continue
        taken = hf.native.config_from_native(config).router_options
        assert taken.keys() == set(option_names(name)) - {"init_std"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": {"name": "rmoe", "passing": "shuffle"}}, "router.passing is 'shuffle'"),
        ({"block": "post_norm", "num_kv_heads": None}, "model.block is 'post_norm', must be 'pre_norm'"),
    ],
)
def test_what_one_file_does_not_have_is_refused(build, settings, message):
    with pytest.raises(ConfigError, match=message):
        hf.from_native(build(**settings))


@each_router
def test_a_new_model_starts_as_wide_as_a_native_one(build, settings):
    model = build(**settings)
    torch.manual_seed(0)
    other = hf.ReMoEForCausalLM(hf.native.config_from_native(model.config))
    tensors = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.numel() > 200:
            assert tensors[name].std().item() == pytest.approx(parameter.std().item(), rel=0.2, abs=1e-9), name
