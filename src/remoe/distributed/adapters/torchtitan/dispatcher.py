"""torchtitan's token dispatch for tokens that have any number of experts."""

# pyright: reportMissingImports=false

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchtitan.models.common.token_dispatcher import LocalDispatchMetadata, LocalTokenDispatcher


class VariableExpertsDispatcher(LocalTokenDispatcher):
    """The scores of all E experts in order, 0 where one is not used: only rows of the others are made."""

    @dataclass(kw_only=True, slots=True)
    class Config(LocalTokenDispatcher.Config):
        """As its base's."""

    def dispatch(
        self, x_TD: Tensor, topk_scores_TK: Tensor, topk_expert_ids_TK: Tensor, num_local_tokens_per_expert_E: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """Rows sorted by expert, tokens at each expert, and what the base's combine needs; K is E here."""
        expert_N, token_N = (topk_scores_TK > 0).T.nonzero(as_tuple=True)
        metadata = LocalDispatchMetadata(
            token_indices_experts_sorted_N=token_N, topk_scores_experts_sorted_N=topk_scores_TK[token_N, expert_N]
        )
        return x_TD[token_N], num_local_tokens_per_expert_E, metadata
