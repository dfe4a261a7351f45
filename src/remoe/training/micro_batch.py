"""One micro-batch: what the model makes of it, its loss, and what is measured. Tensors in, tensors out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from remoe.data import Batch
from remoe.data.sampler import NO_TOKEN
from remoe.distributed.ranks import Ranks
from remoe.model.causal_lm import LossOutput
from remoe.model.decoder import Handed
from remoe.moe.routing import Routing
from remoe.training import router_hooks
from remoe.training.config import TrainConfig
from remoe.training.counts import RoutingCounts, count
from remoe.training.objective import Objective
from remoe.training.router_hooks import Observed

Values = dict[str, Tensor]


class Weighing(NamedTuple):
    """What all losses of a step are weighed with: tensors, so that a new value compiles nothing anew."""

    num_labels: Tensor
    """Labels of the whole step, fp32."""
    coef: Tensor | None
    """The sparsity coefficient; None for models without the L1 term."""
    loads_LE: Tensor | None
    """The previous step's loads, where the L1 term is weighed by them."""
    has_loads: Tensor


class Measured(NamedTuple):
    """What one micro-batch, or several, came to."""

    values: Values
    """By name: 'loss', which carries the gradient, and its parts."""
    counts: RoutingCounts | None
    """All ranks' counts; None for a model without MoE layers."""
    needs_C: Tensor | None
    """What each of this rank's C row capacities had to hold, of the micro-batch that needed most: every layer's active
    pairs, or where ranks share experts its `Routing.needs`."""
    overflow: Tensor | None
    """0-dim bool: a layer had more pairs than rows; None where none has a row capacity."""
    observed: Observed

    def detached(self) -> "Measured":
        """The same without gradients."""
        return self._replace(values={name: value.detach() for name, value in self.values.items()})

    def plus(self, other: "Measured") -> "Measured":
        """Both together."""
        return Measured(
            {name: value + other.values[name] for name, value in self.values.items()},
            self.counts.plus(other.counts) if self.counts and other.counts else None,
            _of_both(torch.maximum, self.needs_C, other.needs_C),
            _of_both(torch.logical_or, self.overflow, other.overflow),
            router_hooks.added(self.observed, other.observed),
        )


@dataclass(frozen=True, eq=False)
class MicroBatchLoss:
    """The objective of one micro-batch that counts for `share` of a step's auxiliary terms. Of a part of the model it
    is what that adds to the whole one's, and all that is measured is of the part's own layers.
    """

    config: TrainConfig
    model: nn.Module
    device: torch.device
    objective: Objective
    routers: Sequence[Any]
    ranks: Ranks
    share: float

    def __call__(self, batch: Batch, weighing: Weighing) -> Measured:
        """Forward and losses of a batch that is on the device."""
        return self.measure(self.forward(batch), weighing)

    def forward(self, batch: Batch, handed: Handed | None = None) -> LossOutput:
        """What the model makes of a batch, or a part of it of what the part before handed on."""
        with autocast(self.config.train.precision, self.device):
            documents_BS = attention_documents(batch, self.config)
            mask_BS = counted_tokens(batch, self.config)
            return self.model(
                batch.tokens_BS, mask_BS, document_BS=documents_BS, labels_BS=batch.labels_BS, handed=handed
            )

    def measure(self, output: LossOutput, weighing: Weighing) -> Measured:
        """Losses and counts of a forward pass."""
        routings = [routing for routing in output.routings if routing is not None]
        own_counts = count(routings)
        counts = own_counts and RoutingCounts(**self.ranks.total_of_layers(own_counts._asdict()))
        lm = output.losses / weighing.num_labels  # micro-batches add up to the mean over the step's labels
        terms = self.objective.terms(routings, self._loads(counts, weighing), self._ranks_loads(counts))
        coef = self.objective.spare_starving(counts, weighing.coef)
        values = {"loss": lm + self.share * self.objective.penalties(terms, coef), "lm_loss": lm}
        values |= {name: self.share * term_L for name, term_L in terms.items()}
        needs_C = needs_of(routings, own_counts) if own_counts else None
        observed = router_hooks.observe(self.routers, routings, self.share)
        return Measured(values, counts, needs_C, any_overflow(routings), observed)

    def _loads(self, counts: RoutingCounts | None, weighing: Weighing) -> Tensor | None:
        """The previous step's loads, or in the very first step the micro-batch's."""
        if weighing.loads_LE is None or counts is None:
            return self._ranks_loads(counts)
        return torch.where(weighing.has_loads, weighing.loads_LE, counts.loads_LE)

    def _ranks_loads(self, counts: RoutingCounts | None) -> Tensor | None:
        """The loads of all ranks' micro-batches together, where a routing's own are not the same."""
        is_shared = self.ranks.size > 1 and self.config.sparsity.mode == "paper"
        return counts.loads_LE if counts and is_shared and self.config.sparsity.loads != "micro_batch" else None


def needs_of(routings: Sequence[Routing], counts: RoutingCounts) -> Tensor:
    """What row capacities must hold [C]: each layer's active pairs, or where ranks share experts what exchanges say."""
    needs = [routing.needs for routing in routings if routing.needs is not None]
    return torch.cat(needs) if needs else counts.active_L


def any_overflow(routings: Sequence[Routing]) -> Tensor | None:
    """Whether any layer had more pairs than rows, 0-dim; None where none has a row capacity."""
    flags = [routing.overflow for routing in routings if routing.overflow is not None]
    return torch.stack(flags).any() if flags else None


def split(batch: Batch, size: int) -> Iterator[Batch]:
    """Cut a batch into micro-batches of `size` rows."""
    parts = zip(*(values.split(size) for values in batch), strict=True)
    return (Batch(*part) for part in parts)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; to a GPU through pinned memory, so that nothing waits."""
    if device.type != "cuda":
        return Batch(*(values.to(device) for values in batch))
    return Batch(*((v if v.is_pinned() else v.pin_memory()).to(device, non_blocking=True) for v in batch))


def attention_documents(batch: Batch, config: TrainConfig) -> Tensor | None:
    """Document numbers that confine attention, where `data.document_mask` asks for it."""
    return batch.document_BS if config.data.document_mask else None


def counted_tokens(batch: Batch, config: TrainConfig) -> Tensor | None:
    """False for padding, where the data have some: it is not attended to, routed or counted."""
    return batch.document_BS != NO_TOKEN if config.data.holds_instructions else None


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 autocast, or none for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _of_both(operation: Any, one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return operation(one, other) if one is not None and other is not None else one
