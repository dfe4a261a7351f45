"""A model works with every registered router, named in its config; a new one is tested here without a change."""

import pytest
import torch

from remoe.model import ReMoEConfig, ReMoEForCausalLM
from remoe.model.size import parameter_count
from remoe.model.weights import load_model, save_model
from remoe.moe.routers import ROUTERS

TOKENS_BS = torch.arange(36).view(2, 18) % 37
every_router = pytest.mark.parametrize("name", sorted(ROUTERS))


def model_with(name) -> ReMoEForCausalLM:
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 8, "num_experts": 4, "top_k": 2}
    return ReMoEForCausalLM(ReMoEConfig(vocab_size=37, router=name, **sizes), seed=0)


def gradients_of(model):
    model.zero_grad()
    torch.manual_seed(1)
    logits = model(TOKENS_BS).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS_BS[:, 1:].flatten()).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@every_router
def test_recomputed_layers_have_the_gradients_of_kept_ones(name):
    model = model_with(name).train()
    kept = gradients_of(model)
    model.activation_checkpointing = True
    recomputed = gradients_of(model)
    assert len(kept) > 0
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@every_router
def test_its_parameters_are_counted_without_building_the_model(name):
    model = model_with(name)
    assert parameter_count(model.config).total == sum(parameter.numel() for parameter in model.parameters())


@every_router
def test_a_saved_model_gives_the_same_logits_and_text_and_keeps_frozen_what_was(name, tmp_path):
    model = model_with(name).eval()
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded(TOKENS_BS).logits, model(TOKENS_BS).logits)
    assert torch.equal(loaded.generate(TOKENS_BS[:, :5], 4), model.generate(TOKENS_BS[:, :5], 4))
    frozen = [[n for n, p in m.named_parameters() if not p.requires_grad] for m in (model, loaded)]
    assert frozen[0] == frozen[1]


@every_router
def test_the_rows_of_a_routing_follow_the_tokens_of_the_batch(name):
    for routing in model_with(name).eval()(TOKENS_BS).routings:
        assert routing.weights_TE.shape == routing.routing_map_TE.shape == (TOKENS_BS.numel(), 4)
        assert routing.weights_TE.isfinite().all()
