"""The small models of tests/model, as native ones and in transformers' class."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from remoe.model import ReMoEConfig, ReMoEForCausalLM
from tests.model.conftest import SMALL

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def build() -> Callable[..., ReMoEForCausalLM]:
    """Build a small native model in eval mode: dense and MoE layers mixed unless a setting says otherwise."""

    def builder(seed: int = 0, **settings: Any) -> ReMoEForCausalLM:
        return ReMoEForCausalLM(ReMoEConfig(**SMALL | settings), seed=seed).eval()

    return builder


@pytest.fixture
def tokens_BS() -> torch.Tensor:
    """Two rows of eleven token ids."""
    return torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(5))
