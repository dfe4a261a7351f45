"""The same weights give the same logits in transformers' own models."""

import pytest
import torch

pytestmark = pytest.mark.heavy
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SHARED = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": False,
}


def assert_equal_logits(model, other, tokens_BS, mask_BS):
    expected = other.eval()(input_ids=tokens_BS, attention_mask=mask_BS).logits
    seen = mask_BS.bool()
    torch.testing.assert_close(model(tokens_BS, mask_BS).logits[seen], expected[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", [0, 4])
def test_a_dense_model_is_a_llama(build, tokens_BS, padding):
    model = build(moe_layers="none")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHARED))
    llama.load_state_dict(model.state_dict())
    mask_BS = torch.ones_like(tokens_BS)
    mask_BS[0, :padding] = 0
    assert_equal_logits(model, llama, tokens_BS, mask_BS)


def test_a_renormalised_top_k_model_is_a_mixtral(build, tokens_BS):
    model = build(moe_layers="all", router={"name": "topk", "renormalize": True}, top_k=2)
    config = transformers.MixtralConfig(**SHARED, num_local_experts=4, num_experts_per_tok=2)
    mixtral = transformers.MixtralForCausalLM(config)
    state = {name.replace("mlp.router.", "mlp.gate."): tensor for name, tensor in model.state_dict().items()}
    mixtral.load_state_dict(state)
    assert_equal_logits(model, mixtral, tokens_BS, torch.ones_like(tokens_BS))
