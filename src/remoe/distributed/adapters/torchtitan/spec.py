"""A torchtitan model spec with ReLU routing, and the hook that moves its sparsity coefficient."""

# pyright: reportMissingImports=false

import copy
import dataclasses
from functools import partial
from typing import Any

import torch
from torch import nn
from torchtitan.models.common.moe import MoE
from torchtitan.protocols.model_spec import ModelSpec

from remoe.distributed.adapters.counts import summed
from remoe.distributed.adapters.torchtitan.dispatcher import VariableExpertsDispatcher
from remoe.distributed.adapters.torchtitan.moe import ReLUMoE
from remoe.errors import ConfigError
from remoe.moe.sparsity import SparsityController


def with_relu_routing(
    spec: ModelSpec, tokens_per_step: int, *, init: float = 1e-8, multiplier: float = 1.2
) -> ModelSpec:
    """A copy of a model's spec whose MoE layers route by ReLU, about top_k experts a token on average.

    Give it `training.global_batch_size * training.seq_len` tokens. Parallelism: data only (FSDP, HSDP, replicas);
    without compiled blocks. Raises ConfigError for a model without MoE layers or with routing that ReLU replaces.
    """
    layers = list(spec.model.traverse(MoE.Config))
    if not layers:
        raise ConfigError(f"model {spec.name}/{spec.flavor} has no MoE layers, must have some; choose an MoE flavor")
    routed = copy.copy(spec)
    routed.model = copy.deepcopy(spec.model)
    settings = {"num_moe_layers": len(layers), "tokens_per_step": tokens_per_step, "init": init}
    for name, config, parent, key in list(routed.model.traverse(MoE.Config)):
        assert parent is not None, "an MoE layer is part of a model"
        _put(parent, key, _relu_config(name, config, settings))
    routed.post_optimizer_build_fn = partial(register_sparsity_hook, multiplier=multiplier)
    return routed


def register_sparsity_hook(
    optimizers: Any, model_parts: list[nn.Module], parallel_dims: Any, multiplier: float = 1.2
) -> None:
    """After each optimizer step move the coefficient of all layers by the counts of all ranks (ReMoE eq. 7).

    Raises ConfigError for tensor, expert, context and pipeline parallelism, and for buffers that are DTensors.
    """
    if parallel_dims.spmd_backend == "full_dtensor":
        raise ConfigError(
            "parallelism.spmd_backend is 'full_dtensor', must be 'spmd_types' or 'partial_dtensor' with ReLU routing, "
            "whose counts are plain tensors"
        )
    for name in ("tp", "ep", "cp", "pp"):
        if getattr(parallel_dims, f"{name}_enabled"):
            raise ConfigError(
                f"{name} parallelism is on, must be off with ReLU routing: only data parallel ranks are counted"
            )
    layers = [module for part in model_parts for module in part.modules() if isinstance(module, ReLUMoE)]
    mesh = parallel_dims.get_optional_mesh("loss")
    for layer in layers:
        layer.data_ranks = None if mesh is None else mesh.get_group()
    optimizers.register_step_post_hook(lambda *_: _update(layers, multiplier))


@torch.no_grad()
def _update(layers: list[ReLUMoE], multiplier: float) -> None:
    """One step of the controller from integer counts; its state is in the layers' buffers, equal in all."""
    first = layers[0]
    counts_LE1 = summed(torch.stack([layer.routing_counts for layer in layers]), first.data_ranks)
    controller = SparsityController(first.top_k, first.num_experts, multiplier=multiplier).to(first.log_coef.device)
    controller.log_coef.copy_(first.log_coef)
    controller.update(counts_LE1[:, :-1].sum(), counts_LE1[:, -1].sum() * first.num_experts)
    for layer in layers:
        layer.log_coef.copy_(controller.log_coef)
        layer.routing_counts.zero_()


def _relu_config(name: str, config: Any, settings: dict[str, Any]) -> Any:
    router = config.router
    if router.num_expert_groups is not None or router.route_scale != 1.0:
        raise ConfigError(
            f"{name} routes within groups or scales its scores, must do neither with ReLU routing, which ignores both"
        )
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    experts = copy.copy(config.routed_experts)
    num_experts = config.num_experts
    experts.token_dispatcher = VariableExpertsDispatcher.Config(num_experts=num_experts, top_k=num_experts)
    return ReLUMoE.Config(**(own | {"routed_experts": experts, "load_balance_coeff": None}), **settings)


def _put(parent: Any, key: Any, value: Any) -> None:
    if isinstance(key, int):
        parent[key] = value
    else:
        setattr(parent, key, value)
