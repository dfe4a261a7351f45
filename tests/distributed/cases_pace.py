"""Runs in which one process is slow."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from remoe.config import from_dict
from remoe.data import Sampler
from remoe.distributed.world import rank
from remoe.moe.experts import GroupedExperts
from remoe.training import TrainConfig, train

PAUSE_SECONDS = 0.25


def slowest(owner: type, method: str, slow_rank: int, **parallel: int) -> list[tuple[int, float]]:
    """Who was slowest in each step of a short run in which one rank takes longer in a method, and how much."""
    folder = Path(os.environ["FOLDER"])
    text = folder / "text.txt"
    text.write_text("\n\n".join("some words and others " * 20 for _ in range(20)))
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 16,
             "num_experts": 4}  # fmt: skip
    values = {
        "name": f"{method}-{slow_rank}-{'-'.join(parallel)}",
        "model": sizes,
        "data": {"train": str(text), "sequence_length": 16, "cache": str(folder / "cache")},
        "train": {"steps": 4, "batch_size": 4, "flip_interval": 0, "validation_batches": 1, "device": "cpu"},
        "parallel": parallel,
    }
    original = getattr(owner, method)

    def slow(*arguments: Any, **options: Any) -> Any:
        if rank() == slow_rank:
            time.sleep(PAUSE_SECONDS)
        return original(*arguments, **options)

    with patch.object(owner, method, slow):
        run = train(from_dict(TrainConfig, values), root=folder, overwrite=True)
    return [(line["slowest_rank"], line["slowest_ratio"]) for line in run.metrics()]


CASES: dict[str, Callable[[], Any]] = {
    "slow_experts": lambda: slowest(GroupedExperts, "forward", 1),
    "slow_shared_experts": lambda: slowest(GroupedExperts, "forward", 0, expert=2, context=2),
    "slow_batches": lambda: slowest(Sampler, "rows", 1),
}
