"""Small models with weights large enough that every part shows in the logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from remoe.model import ReMoEConfig, ReMoEForCausalLM

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "num_experts": 4,
    "init_std": 0.2,
    "moe_layers": [0, 2],
}


@pytest.fixture
def build() -> Callable[..., ReMoEForCausalLM]:
    """Build a small model in eval mode: dense and MoE layers mixed unless a setting says otherwise."""

    def builder(seed: int = 0, **settings: Any) -> ReMoEForCausalLM:
        return ReMoEForCausalLM(ReMoEConfig(**SMALL | settings), seed=seed).eval()

    return builder


@pytest.fixture
def tokens_BS() -> torch.Tensor:
    """Two rows of eleven token ids."""
    return torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(5))
