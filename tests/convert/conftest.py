"""Small random models of each family, and text that means nothing to them."""

import pytest
import torch

from remoe.convert.text import ConversionText, TextSizes, split_text
from remoe.data import Batch

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
DEEPSEEK = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 8, "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 16,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "intermediate_size": 48, "routed_scaling_factor": 1.5,
}  # fmt: skip
FAMILIES = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16},
    "qwen2_moe": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 48,
        "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 48,
        "head_dim": 8, "mlp_only_layers": [1], "norm_topk_prob": True,
    },
    "deepseek_v2": DEEPSEEK | {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": DEEPSEEK | {"n_group": 2, "topk_group": 1, "norm_topk_prob": True},
    "granitemoe": {
        "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16, "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5, "logits_scaling": 1.5, "attention_multiplier": 0.3,
    },
}  # fmt: skip


@pytest.fixture
def build_family():
    """A random model of a family of transformers, with Top-K gates."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    def build(model_type, **changes):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(model_type, **SIZES | FAMILIES.get(model_type, {}) | changes)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for name, tensor in model.state_dict().items():
            if name.endswith(("gate.weight", "router.weight")):
                tensor.normal_(std=0.3)
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.1)
        return model

    return build


@pytest.fixture
def text() -> ConversionText:
    """24 random sequences to fit on, 8 others."""
    return random_text()


def random_text(vocab_size: int = VOCAB) -> ConversionText:
    generator = torch.Generator().manual_seed(1)
    sequences = []
    for _ in range(32):
        tokens_BS = torch.randint(3, vocab_size, (1, 33), generator=generator)
        zeros_BS = torch.zeros(1, 32, dtype=torch.int64)
        sequences.append(Batch(tokens_BS[:, :-1], tokens_BS[:, 1:], zeros_BS, zeros_BS))
    return split_text(sequences, TextSizes(calibration_sequences=24, batch_size=4))
