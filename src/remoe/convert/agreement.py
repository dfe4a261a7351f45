"""How far a converted model is from its source: losses, and the distance of their predictions."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from remoe.convert.swap import LayerCounts
from remoe.data import Batch
from remoe.data.sampler import NO_LABEL

Logits = Callable[[Tensor], Tensor]
"""tokens_BS to logits [B, S, V]."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Two models on the same text. Losses in nats a token; `same_top_1` is the share of equal likeliest tokens."""

    tokens: int
    loss_before: float
    loss_after: float
    kl_divergence: float
    """Mean over tokens of KL(before, after) in nats."""
    same_top_1: float
    largest_logit_difference: float


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion made, and how close it is to its source. Layers are the MoE layers."""

    source: str
    target: str
    """native, or the model type in transformers."""
    agreement: Agreement | None
    """None where no text was given: the conversion is exact."""
    top_k: int | None = None
    active_experts: tuple[float, ...] = ()
    """A token, each layer, on text that fitted nothing."""
    overlap: tuple[float, ...] = ()
    """Share of the Top-K pairs that are still active, each layer."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def measure_agreement(before: Logits, after: Logits, batches: Iterable[Batch]) -> Agreement:
    """Compare two models on the labelled tokens of some batches."""
    sums = torch.zeros(4, dtype=torch.float64)
    num_tokens, largest = 0, 0.0
    for batch in batches:
        counted_BS = batch.labels_BS != NO_LABEL
        labels_N = batch.labels_BS[counted_BS]
        old_NV, new_NV = (model(batch.tokens_BS)[counted_BS].float() for model in (before, after))
        old_log_NV, new_log_NV = old_NV.log_softmax(-1), new_NV.log_softmax(-1)
        parts = (
            F.nll_loss(old_log_NV, labels_N, reduction="sum"),
            F.nll_loss(new_log_NV, labels_N, reduction="sum"),
            F.kl_div(new_log_NV, old_log_NV, reduction="sum", log_target=True),
            (old_NV.argmax(-1) == new_NV.argmax(-1)).sum(),
        )
        sums += torch.tensor([float(part) for part in parts], dtype=torch.float64)
        num_tokens += len(labels_N)
        largest = max(largest, float((old_NV - new_NV).abs().max()))
    loss_before, loss_after, kl_divergence, same_top_1 = (sums / num_tokens).tolist()
    return Agreement(
        tokens=num_tokens,
        loss_before=loss_before,
        loss_after=loss_after,
        kl_divergence=kl_divergence,
        same_top_1=same_top_1,
        largest_logit_difference=largest,
    )


def layer_figures(counts: Sequence[LayerCounts]) -> dict[str, tuple[float, ...]]:
    """The per-layer fields of a Conversion."""
    return {
        "active_experts": tuple(layer.active_experts for layer in counts),
        "overlap": tuple(layer.overlap for layer in counts),
    }
