"""Loss on held-out text, as a whole and per domain."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from remoe.data import Batch
from remoe.data.sampler import NO_LABEL, NO_TOKEN
from remoe.distributed.ranks import Ranks
from remoe.moe import stats
from remoe.moe.evaluation import evaluated_as, other_evaluations
from remoe.moe.routing import Routing, count_tokens
from remoe.training.micro_batch import autocast, to_device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the mode from before is put back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    domains: Sequence[str],
    *,
    document_mask: bool = False,
    precision: str = "fp32",
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Mean loss per label: `loss`, `per_domain` {name: loss} and `active_experts` (per token, mean over MoE layers).

    Losses are in nats; `labels` {name: count} tells how many labels they are over. A domain without a label in the
    batches is left out; a dense model has no active experts (None). `others` {name: the same values} holds the other
    ways in which the routers can be evaluated (moe.evaluation). `ranks` share the batches; all get the same result.
    """
    ranks = ranks or Ranks()
    device = next(model.parameters()).device
    ways = dict.fromkeys(way for own in ranks.gather(other_evaluations(model)) for way in own)
    totals = {way: _Sums(len(domains), device) for way in (None, *ways)}
    with evaluating(model):
        for batch, is_own in ranks.share_out(batches):
            mask_BS = token_mask(batch)
            mask_BS = mask_BS if mask_BS is None else mask_BS.to(device)
            batch = to_device(batch, device)
            document_BS = batch.document_BS if document_mask else None
            for way, total in totals.items():
                with autocast(precision, device), evaluated_as(model, way):
                    output = ranks.evaluate(
                        model, batch.tokens_BS, mask_BS, document_BS=document_BS, labels_BS=batch.labels_BS,
                        reduction="none",
                    )  # fmt: skip
                if is_own:
                    total.add_routings([routing for routing in output.routings if routing is not None])
                if is_own and output.handed is None:
                    own = Batch(*(values[:, ranks.columns(values.shape[1])] for values in batch))
                    total.add_losses(output.losses, own)
    for total in totals.values():
        total.add_over(ranks)
    others = {way: total.result(domains) for way, total in totals.items() if way is not None}
    return totals[None].result(domains) | {"others": others}


def token_mask(batch: Batch) -> Tensor | None:
    """False for the padding after a short text; None where there is none."""
    counted_BS = batch.document_BS != NO_TOKEN
    return None if counted_BS.all() else counted_BS


class _Sums:
    """Running sums on the device: float64 and in a fixed order, so that the result has the same bits each time."""

    def __init__(self, num_domains: int, device: torch.device) -> None:
        self.domain_D1 = torch.arange(num_domains, device=device)[:, None]
        self.losses_D = torch.zeros(num_domains, dtype=torch.float64, device=device)
        self.labels_D = torch.zeros(num_domains, dtype=torch.int64, device=device)
        self.active = torch.zeros((), dtype=torch.int64, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)

    def add_losses(self, losses_BS: Tensor, batch: Batch) -> None:
        labels_T, losses_T = batch.labels_BS.flatten(), losses_BS.flatten()
        member_DT = (batch.domain_BS.flatten() == self.domain_D1) & (labels_T != NO_LABEL)
        self.losses_D += torch.where(member_DT, losses_T.to(torch.float64), 0.0).sum(1)
        self.labels_D += member_DT.sum(1)

    def add_routings(self, routings: Sequence[Routing]) -> None:
        for routing in routings:
            self.active += stats.active_pairs(routing)
            self.tokens += count_tokens(routing)

    def add_over(self, ranks: Ranks) -> None:
        sums = {"losses_D": self.losses_D, "labels_D": self.labels_D, "active": self.active, "tokens": self.tokens}
        self.losses_D, self.labels_D, self.active, self.tokens = ranks.total(sums).values()

    def result(self, domains: Sequence[str]) -> dict[str, Any]:
        losses, counts = self.losses_D.tolist(), self.labels_D.tolist()
        seen = [index for index, count in enumerate(counts) if count]
        tokens = int(self.tokens)
        return {
            "loss": sum(losses) / sum(counts) if seen else math.nan,
            "per_domain": {domains[index]: losses[index] / counts[index] for index in seen},
            "active_experts": int(self.active) / tokens if tokens else None,
            "labels": {domains[index]: counts[index] for index in seen},
        }
