"""All routers of one Megatron model on this rank: how layers get them, and what they share."""

# pyright: reportMissingImports=false

import copy
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from remoe.distributed.adapters.counts import StepCounts
from remoe.distributed.adapters.megatron.layer import RoutedTransformerLayer
from remoe.distributed.adapters.megatron.router import ROUTERS, MegatronRouter, Penalties
from remoe.distributed.adapters.megatron.settings import RouterSettings, check_config, experts_of
from remoe.errors import ConfigError
from remoe.moe.cells import share_cell

Spec = TypeVar("Spec", ModuleSpec, TransformerBlockSubmodules)


class Routers:
    """One object for a model, however many chunks of it this rank has; a copy of it is the object itself.

    It holds the sparsity coefficient: not the config, which Megatron copies, nor a module, which it casts to bf16.
    `device`: where the model trains; None: the GPU of this rank. Raises ConfigError for options of the
    TransformerConfig that would do nothing, or wrong, with these routers.
    """

    def __init__(
        self, config: TransformerConfig, settings: RouterSettings | None = None, device: torch.device | None = None
    ) -> None:
        self.config = config
        self.settings = settings = RouterSettings() if settings is None else settings
        check_config(config, settings)
        device = torch.device(torch.cuda.current_device()) if device is None else device
        self.controller = settings.controller(config).to(device)
        self.counts = StepCounts(config.num_layers, experts_of(config), device)
        self.last_step = StepCounts(config.num_layers, experts_of(config), device)
        self.coef = self.controller.coef
        self.penalties = Penalties(config, settings, self.coef, self.counts)
        self._cell_owner: MegatronRouter | None = None

    def layer_spec(self, spec: Spec) -> Spec:
        """A copy of a layer's or a block's spec with these routers in its MoE layers.

        Raises ConfigError for a layer that is not Megatron's TransformerLayer.
        """
        spec = copy.deepcopy(spec)
        layers: list[Any] = [spec] if isinstance(spec, ModuleSpec) else list(spec.layer_specs or [])
        for layer in layers:
            if layer.module not in (TransformerLayer, RoutedTransformerLayer):
                raise ConfigError(f"the layer spec is one of {layer.module}, must be one of {TransformerLayer}")
            layer.module = RoutedTransformerLayer
            mlp: Any = layer.submodules.mlp
            if isinstance(mlp, ModuleSpec) and mlp.module is MoELayer:
                mlp.submodules.router = partial(_build, self)  # pyright: ignore
        return spec

    @torch.no_grad()
    def after_optimizer_step(self, updated: bool | Tensor = True, groups: ProcessGroupCollection | None = None) -> None:
        """Move the sparsity coefficient by what the routers did in this step, on all ranks alike; call it on all.

        `updated`: what optimizer.step() says; a step that it skipped leaves the coefficient alone. `groups`: the
        model's, with `tp_dp_cp` and `pp`; None: parallel_state's. The host waits for nothing.
        """
        if groups is None:
            groups = ProcessGroupCollection.use_mpu_process_groups(["tp_dp_cp", "pp"])
        self.last_step = self.counts.take()
        self.last_step.sum_over([groups.tp_dp_cp, groups.pp])
        skipped = ~updated if isinstance(updated, Tensor) else not updated
        self.controller.update(self.last_step.active_L.sum(), self.last_step.total_L.sum(), skipped)
        self.coef.copy_(self.controller.coef)

    def metrics(self) -> dict[str, Tensor]:
        """Of the last step, on the device: `sparsity` and the next `sparsity_coef`, 0-dim, and `layer_sparsity` [L].

        A layer without experts has the sparsity nan.
        """
        active_L, total_L = self.last_step.active_L, self.last_step.total_L
        return {
            "sparsity": 1 - active_L.sum() / total_L.sum(),
            "layer_sparsity": 1 - active_L / total_L,
            "sparsity_coef": self.coef.clone(),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, the same on all ranks: the log-coefficient in float64."""
        return self.controller.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a saved coefficient."""
        self.controller.load_state_dict(state)
        self.coef.copy_(self.controller.coef)

    def share_cell_with(self, router: MegatronRouter) -> None:
        """Let a recurrent router use the cell of the first one, which owns it: one parameter, one name."""
        owner = self._cell_owner = self._cell_owner or router
        cell = share_cell([owner] if owner is router else [owner, router])
        if cell is not None:
            owner.cell = cell

    def __deepcopy__(self, memo: dict[int, Any]) -> "Routers":
        return self


def _build(
    routers: Routers, /, *, config: TransformerConfig, pg_collection: ProcessGroupCollection | None
) -> MegatronRouter:
    """One layer's router, as MoELayer asks for it."""
    assert pg_collection is not None, "MoELayer hands its groups on"
    sizes = (config.hidden_size, experts_of(config), config.moe_router_topk)
    router = ROUTERS[routers.settings.name](*sizes, init_std=config.init_method_std, **routers.settings.options)
    router.join(pg_collection, routers.penalties)
    routers.share_cell_with(router)
    return router
