"""A comparison small enough to be trained in a second or two."""

from pathlib import Path

import pytest

TINY = (
    "model.hidden_size=16", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1",
    "model.intermediate_size=16", "model.num_experts=4",
    "data.sequence_length=16", "train.steps=4", "train.batch_size=4", "train.validation_batches=2",
    "train.checkpoint_interval=2", "train.device=cpu", "optimizer.warmup_steps=1",
)  # fmt: skip


@pytest.fixture
def tiny_overrides(tmp_path: Path) -> tuple[str, ...]:
    """Overrides that make demo-relu tiny and let it read a small text of its own."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Line {i} of a text, {i * i} is its square." for i in range(200)), encoding="utf-8")
    return (*TINY, f"data.train={text}", f"data.cache={tmp_path / 'cache'}")
