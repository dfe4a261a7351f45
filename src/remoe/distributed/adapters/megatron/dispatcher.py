"""Dropless all-to-all dispatch of tokens that have different numbers of experts."""

# pyright: reportMissingImports=false

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor


class VariableExpertsDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's dispatcher, told how many rows there are: without a capacity it takes T*k for granted.

    The plain permutation does not look at the number, the fused one (moe_permute_fusion) makes room for so many rows.
    """

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """As Megatron's; the number of rows is read by the host before the first permutation."""
        tokens_per_local_expert = super().preprocess(routing_map)
        self.num_out_tokens = routing_map.sum()
        self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_local_expert


def dispatch_variable_experts(layer: MoELayer) -> None:
    """Give an MoE layer a dispatcher for tokens with any number of experts; the all-gather one is right as it is."""
    if isinstance(layer.token_dispatcher, MoEAlltoAllTokenDispatcher):
        layer.token_dispatcher.__class__ = VariableExpertsDispatcher
