"""Training: one optimizer step, the loop around it, checkpoints, metrics, and what a run leaves on disk."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remoe.training.config import TrainConfig
    from remoe.training.loading import load
    from remoe.training.loop import train
    from remoe.training.run import Run

_HOME = {"TrainConfig": "config", "load": "loading", "train": "loop", "Run": "run"}

__all__ = ["Run", "TrainConfig", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'remoe.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"remoe.training.{_HOME[name]}"), name)
