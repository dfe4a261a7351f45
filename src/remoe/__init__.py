"""Mixture-of-Experts language models with fully differentiable (ReLU) and recurrent routing.

The public names load on first use, so that `import remoe` costs little beyond importing torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remoe.errors import CheckpointError, ConfigError, DataError, RemoeError
    from remoe.model import ModelOutput, ReMoEConfig, ReMoEForCausalLM
    from remoe.moe import MoE, MoEConfig, Router, RouterContext, Routing, SparsityController, build_router, losses
    from remoe.training import Run, TrainConfig, load, train

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(
        ("MoE", "MoEConfig", "Router", "RouterContext", "Routing", "SparsityController", "build_router"), "remoe.moe"
    ),
    **dict.fromkeys(("ModelOutput", "ReMoEConfig", "ReMoEForCausalLM"), "remoe.model"),
    **dict.fromkeys(("Run", "TrainConfig", "load", "train"), "remoe.training"),
    **dict.fromkeys(("CheckpointError", "ConfigError", "DataError", "RemoeError"), "remoe.errors"),
}

__all__ = [
    "CheckpointError", "ConfigError", "DataError", "MoE", "MoEConfig", "ModelOutput", "ReMoEConfig",
    "ReMoEForCausalLM", "RemoeError", "Router", "RouterContext", "Routing", "Run", "SparsityController",
    "TrainConfig", "build_router", "load", "losses", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "losses":
        return importlib.import_module("remoe.moe.losses")
    if name not in _HOME:
        raise AttributeError(f"module 'remoe' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
