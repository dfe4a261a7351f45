"""A tiny run for the benchmarks of whole models, and the command line."""

import dataclasses

import pytest

from remoe.bench.model import with_sizes
from remoe.model import ReMoEConfig
from remoe.training.config import DataConfig, TrainConfig
from tests.cli.conftest import remoe

__all__ = ["remoe"]


@pytest.fixture
def run_config() -> TrainConfig:
    model = ReMoEConfig(
        vocab_size=97, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=24, num_experts=4
    )
    config = TrainConfig(model=model, data=dataclasses.replace(DataConfig(), sequence_length=64))
    return with_sizes(config, micro_batch=2, accumulation=2, compiled=False)
