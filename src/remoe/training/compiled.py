"""What torch.compile makes of a step: one graph (ParallelConfig.graph: "whole", or "known" rows), or its parts.

FSDP gathers a unit's parameters around its forward pass, and an exchange whose rows are not known waits for counts:
graphs end there. Layers share graphs, as their parameters are inputs.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from remoe.data import Batch
from remoe.model.sequence import WHOLE
from remoe.moe import MoE
from remoe.training.micro_batch import Measured, MicroBatchLoss, Weighing

MOST_GRAPHS = 64
"""Of one function: each set of row capacities or shape of a batch is one more, and torch would stop at its eighth."""


def compiled(loss: MicroBatchLoss) -> Callable[[Batch, Weighing], Measured]:
    """Model and losses as one graph."""
    return _compiled(loss.__call__)


def compile_parts(model: Any, *, has_whole_layers: bool) -> None:
    """Let attention, routers and dense MLPs run as a graph each, in place; after FSDP has taken them.

    `has_whole_layers`: FSDP has not. Layers then run as graphs that end only where ranks exchange tokens.
    """
    for layer in model.model.present_layers():
        is_alone = getattr(layer.self_attn, "sequence", WHOLE) is WHOLE
        if has_whole_layers and is_alone:
            _compile_forward(layer, fullgraph=False)
            continue
        if is_alone:
            _compile_forward(layer.self_attn)
        _compile_forward(layer.mlp.router if isinstance(layer.mlp, MoE) else layer.mlp)


def _compile_forward(module: nn.Module, *, fullgraph: bool = True) -> None:
    """Only the function: hooks around it stay as they are."""
    module.forward = _compiled(module.forward, fullgraph=fullgraph)


def _compiled(function: Callable[..., Any], *, fullgraph: bool = True) -> Callable[..., Any]:
    # fp32 products are few (routers), and their precision is meant
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores for float32 matrix multiplication available")
    torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    return torch.compile(function, fullgraph=fullgraph, dynamic=False)
