"""How much one optimizer step changes the routing of fixed calibration tokens (ReMoE Fig. 10)."""

from collections.abc import Sequence

from torch import Tensor, nn

from remoe.data import Batch
from remoe.moe.stats import flip_rate
from remoe.training.micro_batch import autocast
from remoe.training.validation import evaluating, token_mask

CALIBRATION_SEQUENCES = 4


class FlipMeter:
    """Routing maps before and after a step, on the same tokens in eval mode."""

    def __init__(self, model: nn.Module, batch: Batch, document_mask: bool, precision: str = "fp32") -> None:
        device = next(model.parameters()).device
        batch = Batch(*(values[:CALIBRATION_SEQUENCES] for values in batch))
        mask_BS = token_mask(batch)
        self.model = model
        self.autocast = autocast(precision, device)
        self.tokens_BS = batch.tokens_BS.to(device)
        self.mask_BS = mask_BS if mask_BS is None else mask_BS.to(device)
        self.document_BS = batch.document_BS.to(device) if document_mask else None
        self._before: Sequence[Tensor] = ()

    def before_step(self) -> None:
        """Remember the routing maps as they are now."""
        self._before = self._maps()

    def after_step(self) -> dict[str, Tensor]:
        """`flip_rate`, and `flip_count` per token and layer (E times the rate): 0-dim, on the device."""
        rate = flip_rate(self._before, self._maps())
        return {"flip_rate": rate, "flip_count": rate * self._before[0].shape[1]}

    def _maps(self) -> list[Tensor]:
        with evaluating(self.model), self.autocast:
            routings = self.model(self.tokens_BS, self.mask_BS, document_BS=self.document_BS).routings
        return [routing.routing_map_TE for routing in routings if routing is not None]
