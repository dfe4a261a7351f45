"""Megatron's transformer layer, with what variable numbers of experts and router states need."""

# pyright: reportMissingImports=false

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from remoe.distributed.adapters.megatron.dispatcher import dispatch_variable_experts
from remoe.distributed.adapters.megatron.router import MegatronRouter


class RoutedTransformerLayer(TransformerLayer):
    """The router state rides from layer to layer as `context`, the tensor for cross-attention, which a GPT lacks.

    So it is an argument and a result of a layer: recomputation has it, and its gradient comes back.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.mlp, MoELayer):
            dispatch_variable_experts(self.mlp)

    def forward(self, *args: Any, context: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The new hidden states [S, B, H] and the router state for the next layer, which dense layers pass on."""
        router = self.mlp.router if isinstance(self.mlp, MoELayer) else None
        if not isinstance(router, MegatronRouter) or not router.state_size:
            return super().forward(*args, context=context, **kwargs)  # pyright: ignore[reportReturnType]
        router.given_state_TP = context
        try:
            hidden_states, _ = super().forward(*args, **kwargs)
            return hidden_states, router.left_state_TP  # pyright: ignore[reportReturnType]
        finally:
            router.given_state_TP = router.left_state_TP = None
