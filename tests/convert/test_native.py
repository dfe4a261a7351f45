"""Mixtral and Llama as our model and back, Top-K checkpoints with ReLU gates, and dense ones upcycled."""

import pytest
import torch

from remoe import ReMoEConfig, ReMoEForCausalLM
from remoe.convert.native import filled, from_transformers, missing_in_top_k, to_transformers
from remoe.convert.own import Upcycling, swap_native_gates, upcycle
from remoe.errors import CheckpointError, ConfigError

TOKENS = torch.arange(3, 59).view(2, 28)
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48,
    "num_experts": 8, "top_k": 2, "init_std": 0.2,
}  # fmt: skip


def native(**settings):
    return ReMoEForCausalLM(ReMoEConfig(**SMALL | settings)).eval()


def equal_logits(model, other, tolerance=1e-4):
    torch.testing.assert_close(model(TOKENS).logits, other(TOKENS).logits, rtol=tolerance, atol=tolerance)


@pytest.mark.heavy
@pytest.mark.parametrize(("model_type", "tied"), [("mixtral", False), ("mixtral", True), ("llama", False)])
def test_mixtral_and_llama_are_our_model_both_ways(model_type, tied, build_family):
    source = build_family(model_type, tie_word_embeddings=tied)
    model = from_transformers(source)
    equal_logits(model, source)
    back = to_transformers(model)
    assert torch.equal(back(TOKENS).logits, source(TOKENS).logits)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in back.state_dict().items())


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("mixtral", {"sliding_window": 8}, "sliding_window 8"),
        ("llama", {"attention_bias": True, "intermediate_size": 48}, "attention_bias True"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type linear"),
        ("olmoe", {}, "model type olmoe"),
    ],
)
def test_what_our_block_has_not_is_refused(model_type, changes, reason, build_family):
    with pytest.raises(ConfigError, match=f"the source has {reason}"):
        from_transformers(build_family(model_type, **changes))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "router relu: it uses as many experts as a token opens"),
        ({"router": "topk"}, "not divided by their sum"),
        ({"router": {"name": "topk", "renormalize": True, "bias": True}}, "with a bias or a warm-up"),
        ({"router": {"name": "topk", "renormalize": True}, "moe_layers": [1]}, "dense layers beside MoE layers"),
        ({"router": "hash"}, "router hash"),
    ],
)
def test_only_what_is_exact_goes_back_to_top_k(settings, reason):
    assert reason in str(missing_in_top_k(ReMoEConfig(**SMALL | settings)))
    with pytest.raises(ConfigError, match="exact are only renormalised Top-K"):
        to_transformers(native(**settings))


@pytest.mark.parametrize("renormalize", [True, False])
def test_a_swapped_checkpoint_uses_k_experts_and_stays_close(renormalize, text):
    source = native(router={"name": "topk", "renormalize": renormalize}, moe_layers=[0, 2])
    converted, report = swap_native_gates(source, text)
    assert converted.config.router == {"name": "relu", "bias": True, "normalize": True}
    assert report.top_k == 2
    assert sum(report.active_experts) / 2 == pytest.approx(2, rel=0.15)
    assert min(report.overlap) > 0.6
    assert report.agreement.loss_after < report.agreement.loss_before + 0.3
    own, other = converted.state_dict(), source.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in own.items() if ".router." not in name)


def test_the_report_tells_of_the_model_that_is_returned(text):
    converted, report = swap_native_gates(native(router="topk"), text)
    active = torch.zeros(3)
    losses, labels = 0.0, 0
    for batch in text.batches:
        active += torch.stack([r.routing_map_TE.sum() for r in converted(batch.tokens_BS).routings])
        losses += float(converted(batch.tokens_BS, labels_BS=batch.labels_BS).losses.detach())
        labels += batch.labels_BS.numel()
    assert report.active_experts == pytest.approx((active / labels).tolist())
    assert report.agreement.loss_after == pytest.approx(losses / labels, rel=1e-5)


def test_only_top_k_can_be_swapped(text):
    for settings, router in (({}, "relu"), ({"moe_layers": "none"}, "none: the model is dense")):
        with pytest.raises(ConfigError, match=f"the source's router is {router}, must be topk"):
            swap_native_gates(native(**settings), text)


@pytest.mark.parametrize(("experts", "granularity"), [(1, 8), (4, 1), (2, 3)])
def test_an_upcycled_model_is_the_dense_one_with_every_expert_on(experts, granularity):
    dense = native(moe_layers="none", num_experts=1, top_k=1)
    model = upcycle(dense, Upcycling(num_experts=experts, granularity=granularity))
    equal_logits(model, dense)
    routings = model(TOKENS).routings
    assert all(routing.routing_map_TE.shape[1] == experts * granularity for routing in routings)
    assert all(routing.routing_map_TE.all() for routing in routings)


def test_copies_of_an_expert_get_gradients_of_their_own():
    model = upcycle(native(moe_layers="none"), Upcycling(num_experts=4))
    model(TOKENS).logits.square().mean().backward()
    gradient = model.model.layers[0].mlp.experts.down_proj.grad
    assert not torch.allclose(gradient[0], gradient[1], rtol=1e-3, atol=0)
    assert model.model.layers[0].mlp.router.weight.grad.abs().sum() > 0


def test_only_dense_models_are_upcycled():
    with pytest.raises(ConfigError, match="must be dense"):
        upcycle(native(), Upcycling())


def test_every_tensor_has_a_place_and_every_place_a_tensor():
    model = native(moe_layers="none")
    state = model.state_dict()
    state["extra"] = state.pop("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"unread .'extra'., missing .'model.norm.weight'."):
        filled(model.config, state)
