"""How much one optimizer step changes the routing of fixed calibration tokens (ReMoE Fig. 10)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from remoe.data import Batch
from remoe.distributed.ranks import Ranks
from remoe.moe.stats import flip_rate
from remoe.training.micro_batch import autocast
from remoe.training.validation import evaluating, token_mask

CALIBRATION_SEQUENCES = 4


class FlipMeter:
    """Routing maps before and after a step, on the same tokens in eval mode."""

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        document_mask: bool,
        precision: str = "fp32",
        ranks: Ranks | None = None,
    ) -> None:
        device = next(model.parameters()).device
        batch = Batch(*(values[:CALIBRATION_SEQUENCES] for values in batch))
        mask_BS = token_mask(batch)
        self.model = model
        self.config: Any = model.config
        self.ranks = ranks or Ranks()
        self.autocast = autocast(precision, device)
        self.tokens_BS, self.labels_BS = batch.tokens_BS.to(device), batch.labels_BS.to(device)
        self.mask_BS = mask_BS if mask_BS is None else mask_BS.to(device)
        self.document_BS = batch.document_BS.to(device) if document_mask else None
        self._before: Sequence[Tensor] = ()

    def before_step(self) -> None:
        """Remember the routing maps as they are now."""
        self._before = self._maps()

    def after_step(self) -> dict[str, Tensor]:
        """`flip_rate`, and `flip_count` per token and layer (E times the rate): 0-dim, on the device.

        Of a part of the model it is what that adds to the whole one's.
        """
        maps, rate = self._maps(), torch.zeros((), device=self.tokens_BS.device)
        if maps:
            rate = flip_rate(self._before, maps) * (len(maps) / self.config.num_moe_layers)
        return {"flip_rate": rate, "flip_count": rate * self.config.moe.routed_experts}

    def _maps(self) -> list[Tensor]:
        with evaluating(self.model), self.autocast:
            routings = self.ranks.evaluate(
                self.model, self.tokens_BS, self.mask_BS, document_BS=self.document_BS, labels_BS=self.labels_BS
            ).routings
        return [routing.routing_map_TE for routing in routings if routing is not None]
