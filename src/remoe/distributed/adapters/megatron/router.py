"""Our routers with the interface that Megatron's MoELayer asks for."""

# pyright: reportMissingImports=false

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from remoe.distributed.adapters.counts import StepCounts, counted_in_backward, counts_of, summed
from remoe.distributed.adapters.megatron.settings import RouterSettings, moe_layers_of
from remoe.moe import losses
from remoe.moe.routers.recurrent import RecurrentReLURouter, RMoERouter
from remoe.moe.routers.relu import ReLURouter
from remoe.moe.routing import RouterContext, Routing


class MegatronRouter(nn.Module):
    """Comes before one of our router classes: the same parameters under the same names, called as Megatron does.

    Auxiliary terms enter as gradients of the gates (Megatron's own way), scaled by the schedule of micro-batches.
    """

    penalty: str
    state_size: int

    def join(self, groups: ProcessGroupCollection, penalties: "Penalties") -> None:
        """Take part in a model: its groups of ranks, and the penalties that all its routers share."""
        self.groups, self.penalties = groups, penalties
        self.layer_number: int | None = None
        self.given_state_TP: Tensor | None = None
        self.left_state_TP: Tensor | None = None
        for parameter in self.parameters():
            parameter.data = parameter.data.to(penalties.config.params_dtype)
            # each tensor parallel rank has seen other tokens: Megatron then sums these gradients over them
            parameter.sequence_parallel = penalties.config.sequence_parallel  # pyright: ignore

    def set_layer_number(self, layer_number: int) -> None:
        """This router's layer in the whole model, from 1."""
        self.layer_number = layer_number

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """weights_TE, fp32 or wider, and routing_map_TE of hidden states [S, B, H]; `padding_mask` [S, B]: padding."""
        token_mask_T = None if padding_mask is None else ~padding_mask.flatten()
        context = RouterContext(state_TP=self.given_state_TP, token_mask_T=token_mask_T)
        routing: Routing = super().forward(input.flatten(0, -2), context)  # pyright: ignore[reportAttributeAccessIssue]
        self.left_state_TP = routing.state_TP
        if not (self.training and torch.is_grad_enabled()):
            return routing.weights_TE, routing.routing_map_TE
        return self.penalties.attach(routing, self), routing.routing_map_TE

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For Megatron's checkpoints: the same on all ranks. One layer has the cell: it is not stacked over layers."""
        tensors = self.state_dict(keep_vars=True)
        cell = {name: tensor for name, tensor in tensors.items() if name.startswith("cell.")}
        own = {name: tensor for name, tensor in tensors.items() if name not in cell}
        return make_sharded_tensors_for_checkpoint(own, prefix, {}, sharded_offsets) | (
            make_sharded_tensors_for_checkpoint(cell, prefix, {})
        )


class Penalties:
    """The auxiliary term of a model's routers, and the counts that its coefficient is updated from.

    `coef` is fp32, 0-dim, on the device, for the whole life of the model: it is changed in place.
    """

    def __init__(self, config: TransformerConfig, settings: RouterSettings, coef: Tensor, counts: StepCounts) -> None:
        self.config, self.settings, self.coef, self.counts = config, settings, coef, counts
        self.layer_share = 1.0 if settings.is_released else 1 / moe_layers_of(config)

    def attach(self, routing: Routing, router: MegatronRouter) -> Tensor:
        """The gates, whose backward pass adds the gradient of the auxiliary term and counts this routing."""
        own_E1 = counts_of(routing)
        shared_E1 = summed(own_E1, router.groups.tp_cp)
        loads_E1 = summed(own_E1, router.groups.tp_dp_cp) if self.settings.loads_of_all else shared_E1
        dtype = routing.weights_TE.dtype
        loads_E = loads_E1[:-1].to(dtype) / loads_E1[-1].clamp(min=1)
        # the term is a mean over all tokens of a micro-batch: the ranks that share it add up
        share = own_E1[-1].to(dtype) / shared_E1[-1].clamp(min=1)
        term = share * self._term(routing, router.penalty, loads_E)
        if self.config.calculate_per_token_loss:
            term = term * shared_E1[-1]  # Megatron will divide by all tokens of the step
        weights_TE: Tensor = MoEAuxLossAutoScaler.apply(routing.weights_TE, term)  # pyright: ignore
        assert router.layer_number is not None, "Megatron numbers a layer when it builds it"
        return counted_in_backward(weights_TE, own_E1, self.counts.rows_LE1[router.layer_number - 1])

    def _term(self, routing: Routing, penalty: str, loads_E: Tensor) -> Tensor:
        top_k = self.config.moe_router_topk
        if penalty == "load_balancing":
            return self.config.moe_aux_loss_coeff * losses.load_balancing(routing, top_k, loads_E)  # pyright: ignore
        l1 = losses.sparsity_l1(routing, top_k, self.settings.load_balanced, loads_E)
        return self.coef * self.layer_share * l1


class MegatronReLURouter(MegatronRouter, ReLURouter):  # pyright: ignore[reportIncompatibleMethodOverride]
    """ReMoE's router in Megatron."""


class MegatronRMoERouter(MegatronRouter, RMoERouter):  # pyright: ignore[reportIncompatibleMethodOverride]
    """RMoE's router in Megatron."""


class MegatronRecurrentReLURouter(MegatronRouter, RecurrentReLURouter):  # pyright: ignore
    """RMoE's state with ReMoE's gate in Megatron."""


ROUTERS: dict[str, Any] = {
    "relu": MegatronReLURouter,
    "rmoe": MegatronRMoERouter,
    "recurrent_relu": MegatronRecurrentReLURouter,
}
