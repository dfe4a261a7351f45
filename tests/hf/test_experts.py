"""Our kernels as experts implementation "remoe" in other mixtures of experts of transformers."""

import pytest
import torch
import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import remoe.hf  # noqa: F401  registers the implementation
from remoe.errors import ConfigError

pytestmark = pytest.mark.heavy

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 2, "first_k_dense_replace": 1,
        "n_shared_experts": 1, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
}  # fmt: skip
TOKENS_BS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def tiny(family, **settings):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES | settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate_up_proj" in name or "down_proj" in name:
                parameter.mul_(8)  # so that the experts show in the output
    return model


def loss_and_gradients(model, implementation):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    output = model(TOKENS_BS, labels=TOKENS_BS)
    output.loss.backward()
    return output.logits, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_eager_experts(family, monkeypatch):
    model = tiny(family, **FAMILIES[family])
    expected, expected_gradients = loss_and_gradients(model, "eager")
    calls, ours = [], ALL_EXPERTS_FUNCTIONS["remoe"]
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "remoe", lambda *args: calls.append(1) or ours(*args))
    logits, gradients = loss_and_gradients(model, "remoe")
    assert calls
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    assert len(gradients) == len(expected_gradients)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_pairs_of_weight_0_and_pairs_without_an_expert_change_nothing():
    experts = tiny("mixtral", **FAMILIES["mixtral"]).model.layers[0].mlp.experts
    hidden_TH = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    index_TK = torch.tensor([[0, 1, 2]]).expand(5, 3)
    weights_TK = torch.tensor([[0.7, 0.0, 0.3]]).expand(5, 3)
    run = ALL_EXPERTS_FUNCTIONS["remoe"]
    expected = run(experts, hidden_TH, index_TK[:, ::2], weights_TK[:, ::2])
    assert run(experts, hidden_TH, index_TK, weights_TK).equal(expected)
    nowhere = torch.tensor([[0, 4, 2]]).expand(5, 3)  # 4 of 4 experts: none
    assert run(experts, hidden_TH, nowhere, weights_TK).equal(expected)


def test_it_keeps_the_dtype_under_autocast_and_in_bf16():
    model = tiny("olmoe", **FAMILIES["olmoe"]).eval()
    model.set_experts_implementation("remoe")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(TOKENS_BS).logits.isfinite().all()
    expected = model.bfloat16()(TOKENS_BS).logits
    model.set_experts_implementation("eager")
    torch.testing.assert_close(model(TOKENS_BS).logits, expected, rtol=0.1, atol=0.1)


def test_experts_of_another_form_are_refused_with_the_way_out():
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    model = tiny("gpt_oss", **sizes)
    model.set_experts_implementation("remoe")
    with pytest.raises(ConfigError, match=r"have has_bias = True, must be False .*set_experts_implementation"):
        model(TOKENS_BS)
