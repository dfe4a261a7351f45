"""A small text of two domains, and configs of models that train on it in a second or two."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from remoe.config import from_dict
from remoe.data import Batch
from remoe.training import TrainConfig

WORDS = {
    "animals": ["cat", "dog", "sat", "ran", "mat", "on", "a", "the"],
    "numbers": ["one", "two", "three", "four", "5", "6", "7", "8"],
}

MODEL = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 16,
    "num_experts": 4,
    "init_std": 0.1,
}


def write_text(path: Path) -> Path:
    """40 documents, the same each time."""
    draw = random.Random(0)
    rows = [
        {"text": " ".join(draw.choices(WORDS[domain], k=60)), "meta": {"pile_set_name": domain}}
        for _ in range(20)
        for domain in WORDS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file."""
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="session")
def config(text: Path) -> Callable[..., TrainConfig]:
    """A small run's config; keyword sections are merged into it, e.g. `config(train={"steps": 3})`."""

    def build(name: str = "small", **sections: dict[str, Any]) -> TrainConfig:
        values: dict[str, Any] = {
            "model": dict(MODEL),
            "data": {"train": str(text), "sequence_length": 16, "cache": str(text.parent / "cache")},
            "optimizer": {"warmup_steps": 2, "lr": 0.01},
            "train": {
                "steps": 6,
                "batch_size": 4,
                "validation_interval": 4,
                "validation_batches": 2,
                "checkpoint_interval": 2,
                "flip_interval": 3,
                "device": "cpu",
            },
        }
        for section, changes in sections.items():
            values[section] = values.get(section, {}) | changes
        return from_dict(TrainConfig, {"name": name, **values})

    return build


@pytest.fixture
def batch() -> Batch:
    """Four sequences of eight random bytes, the first one shorter: labels and then tokens are missing."""
    generator = torch.Generator().manual_seed(3)
    tokens_BS = torch.randint(0, 256, (4, 8), generator=generator)
    labels_BS = torch.randint(0, 256, (4, 8), generator=generator)
    labels_BS[0, 5:] = -100
    zeros_BS = torch.zeros_like(tokens_BS)
    document_BS = zeros_BS.clone()
    document_BS[0, 6:] = -1
    return Batch(tokens_BS, labels_BS, document_BS, zeros_BS)


@pytest.fixture(scope="session")
def numbers() -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """The lines of a run without the times: what must be the same bit for bit."""

    def strip(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        times = ("tokens_per_second", "step_seconds", "slowest_rank", "slowest_ratio")
        return [{key: value for key, value in line.items() if key not in times} for line in lines]

    return strip
