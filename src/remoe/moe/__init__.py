"""The layer: routers, dispatch, experts, losses and sparsity control. Knows no trainer, YAML or process group."""

from remoe.moe.config import MoEConfig
from remoe.moe.layer import MoE, moe_layers
from remoe.moe.routers import build_router
from remoe.moe.routing import Router, RouterContext, Routing
from remoe.moe.sparsity import SparsityController

__all__ = ["MoE", "MoEConfig", "Router", "RouterContext", "Routing", "SparsityController", "build_router", "moe_layers"]
