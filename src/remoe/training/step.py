"""One optimizer step: micro-batches forward and backward, one update, one move of the sparsity coefficient.

Nothing here waits for the device. A step whose loss or gradient is not finite is cancelled by a flag on the device:
weights, optimizer, coefficient and the routers' own running state stay as they were.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from remoe.data import Batch
from remoe.data.sampler import NO_LABEL
from remoe.distributed.config import own_micro_batch
from remoe.distributed.ranks import Ranks
from remoe.moe import MoE, SparsityController
from remoe.training import router_hooks
from remoe.training.config import TrainConfig
from remoe.training.counts import RoutingCounts, count
from remoe.training.objective import Objective, lm_loss
from remoe.training.optimizer import build_optimizer, optimizer_step, optimizer_tensors
from remoe.training.router_hooks import Observed
from remoe.training.schedule import has_decayed, learning_rate

Values = dict[str, Tensor]


@dataclass
class Stepper:
    """Model, optimizer and controller of a run, and the rule that moves them by one step."""

    config: TrainConfig
    model: nn.Module
    device: torch.device
    ranks: Ranks = field(default_factory=Ranks)
    forward: nn.Module = field(init=False)
    optimizer: torch.optim.AdamW = field(init=False)
    controller: SparsityController | None = field(init=False, default=None)
    skipped: Tensor = field(init=False)
    """Cancelled steps so far, int64."""
    skipped_in_a_row: Tensor = field(init=False)
    loads_LE: Tensor | None = field(init=False, default=None)
    """Loads of the last step that was not cancelled, for sparsity.loads = previous_step."""
    has_loads: Tensor = field(init=False)

    def __post_init__(self) -> None:
        loop = self.config.train
        self.micro_batch = own_micro_batch(self.ranks.size, loop.batch_size, loop.micro_batch_size)
        self.ranks.place(self.model, self.device, torch.bfloat16 if loop.precision == "bf16" else None)
        self.routers: list[Any] = [module.router for module in self.model.modules() if isinstance(module, MoE)]
        moe = self.config.model.moe
        penalty = self.routers[0].penalty if self.routers else "none"
        self.objective = Objective(
            losses=self.config.losses, sparsity=self.config.sparsity, penalty=penalty, top_k=moe.routed_top_k
        )
        self.model.activation_checkpointing = self.config.train.activation_checkpointing  # pyright: ignore
        self.forward = torch.compile(self.model) if self.config.train.compile else self.model  # pyright: ignore
        self.optimizer = build_optimizer(self.model, self.config.optimizer)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=self.device)
        self.has_loads = torch.zeros((), dtype=torch.bool, device=self.device)
        self.load_balancing_coef = torch.tensor(
            self.objective.load_balancing_coef, dtype=torch.float64, device=self.device
        )
        if penalty == "sparsity_l1":
            self.controller = build_controller(self.config, len(self.routers)).to(self.device)
        if penalty == "sparsity_l1" and uses_previous_loads(self.config):
            self.loads_LE = torch.zeros(len(self.routers), moe.routed_experts, device=self.device)

    def run(self, batch: Batch, step: int) -> Values:
        """Train on this rank's rows of a batch as step number `step`; what all ranks measured, still on the device."""
        self.ranks.seed_step(self.config.seed, step)
        coef = self.controller.coef if self.controller else None
        self.optimizer.zero_grad(set_to_none=True)
        measured, counts, observed = self._forward_backward(batch, coef)
        measured, observed = self.ranks.total(measured), self.ranks.total(observed)
        grad_norm = self.ranks.clip_gradients(self.model, self.config.optimizer.clip)
        skipped = ~(grad_norm.isfinite() & measured["loss"].isfinite())
        optimizer_step(self.optimizer, learning_rate(self.config.optimizer, step, self.config.train.steps), skipped)
        self._after_step(counts, observed, skipped, step)
        if coef is not None:
            measured["sparsity_coef"] = coef
        if self.routers:
            measured["load_balancing_coef"] = self.load_balancing_coef
        measured |= {"grad_norm": grad_norm, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        return measured | (routing_values(counts) if counts else {})

    def _forward_backward(self, batch: Batch, coef: Tensor | None) -> tuple[Values, RoutingCounts | None, Observed]:
        if not self.model.training:
            self.model.train()
        num_labels = self.ranks.total_number(int((batch.labels_BS != NO_LABEL).sum()))
        parts = list(split(batch, self.micro_batch))
        share = 1 / (len(parts) * self.ranks.size)
        measured: Values = {}
        counts: RoutingCounts | None = None
        observed: Observed = {}
        for part in parts:
            values, routings, part_counts = self._losses(to_device(part, self.device), coef, num_labels, share)
            values["loss"].backward()
            counts = counts.plus(part_counts) if counts and part_counts else part_counts
            observed = router_hooks.added(observed, router_hooks.observe(self.routers, routings, share))
            for name, value in values.items():
                measured[name] = measured[name] + value.detach() if name in measured else value.detach()
        return measured, counts, observed

    def _losses(
        self, batch: Batch, coef: Tensor | None, num_labels: int, share: float
    ) -> tuple[Values, list, RoutingCounts | None]:
        """Loss of one micro-batch, with auxiliary terms for `share` of the step's; its routings; all ranks' counts."""
        with autocast(self.config.train.precision, self.device):
            output = self.forward(batch.tokens_BS, document_BS=attention_documents(batch, self.config))
        routings = [routing for routing in output.routings if routing is not None]
        own_counts = count(routings)
        counts = own_counts and RoutingCounts(**self.ranks.total(own_counts._asdict()))
        lm = lm_loss(output.logits, batch.labels_BS, num_labels)
        terms = self.objective.terms(routings, self._loads(counts), self._ranks_loads(counts))
        loss = lm + share * self.objective.penalties(terms, self.objective.spare_starving(counts, coef))
        values = {"loss": loss, "lm_loss": lm} | {name: share * term_L for name, term_L in terms.items()}
        return values, routings, counts

    def _loads(self, counts: RoutingCounts | None) -> Tensor | None:
        """The previous step's loads, or in the very first step the micro-batch's."""
        if self.loads_LE is None:
            return self._ranks_loads(counts)
        assert counts is not None, "loads are kept only for models with MoE layers"
        return torch.where(self.has_loads, self.loads_LE, counts.loads_LE)

    def _ranks_loads(self, counts: RoutingCounts | None) -> Tensor | None:
        """The loads of all ranks' micro-batches together, where a routing's own are not the same."""
        is_shared = self.ranks.size > 1 and self.config.sparsity.mode == "paper"
        return counts.loads_LE if counts and is_shared and self.config.sparsity.loads != "micro_batch" else None

    @torch.no_grad()
    def _after_step(self, counts: RoutingCounts | None, observed: Observed, skipped: Tensor, step: int) -> None:
        self.skipped += skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skipped
        if counts is None:
            return
        if self.controller is not None:
            per_layer = self.config.sparsity.per_layer
            active, total = counts.active_L, counts.total_L
            hold = has_decayed(self.config.optimizer, step, self.config.train.steps, self.config.sparsity.hold_below_lr)
            self.controller.update(*((active, total) if per_layer else (active.sum(), total.sum())), skipped | hold)
        if self.loads_LE is not None:
            self.loads_LE = torch.where(skipped, self.loads_LE, counts.loads_LE)
            self.has_loads = self.has_loads | ~skipped
        router_hooks.after_step(self.routers, counts, observed, skipped, step)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name: live tensors that a checkpoint is read into in place."""
        model = model_tensors(self.model)
        optimizer = {f"optimizer.{n}": value for n, value in optimizer_tensors(self.model, self.optimizer).items()}
        progress = {"progress.skipped": self.skipped, "progress.skipped_in_a_row": self.skipped_in_a_row}
        if self.controller is not None:
            progress |= {f"sparsity.{name}": value for name, value in self.controller.state_dict().items()}
        if self.loads_LE is not None:
            progress |= {"sparsity.loads": self.loads_LE, "sparsity.has_loads": self.has_loads}
        return model | optimizer | progress


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by checkpoint name; a parameter that has two names once."""
    all_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in all_names}
    return {f"model.{name}": value for name, value in (dict(model.named_parameters()) | buffers).items()}


def build_controller(config: TrainConfig, num_layers: int) -> SparsityController:
    """The controller that a run's `sparsity` section asks for."""
    sparsity = config.sparsity
    return SparsityController(
        config.model.moe.routed_top_k,
        config.model.moe.routed_experts,
        init=sparsity.init,
        multiplier=sparsity.multiplier,
        min_coef=sparsity.min_coef,
        max_coef=sparsity.max_coef,
        num_layers=num_layers if sparsity.per_layer else None,
        released=sparsity.mode == "released",
        rule=sparsity.rule,
        full_step_at=sparsity.full_step_at,
        dead_band=sparsity.dead_band,
        average=sparsity.average,
    )


def uses_previous_loads(config: TrainConfig) -> bool:
    """Whether the L1 term is weighed by the previous step's loads (the released code always used the micro-batch's)."""
    return config.sparsity.loads == "previous_step" and config.sparsity.mode == "paper"


def routing_values(counts: RoutingCounts) -> Values:
    """The per-layer numbers that metrics need from a step's counts."""
    return {
        "active": counts.active_L,
        "total": counts.total_L,
        "tokens": counts.tokens_L,
        "without_expert": counts.without_expert_L,
        "idle_experts": (counts.tokens_per_expert_LE == 0).sum(1),
        "max_tokens": counts.tokens_per_expert_LE.amax(1),
    }


def split(batch: Batch, size: int) -> Iterator[Batch]:
    """Cut a batch into micro-batches of `size` rows."""
    parts = zip(*(values.split(size) for values in batch), strict=True)
    return (Batch(*part) for part in parts)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; to a GPU through pinned memory, so that nothing waits."""
    if device.type != "cuda":
        return Batch(*(values.to(device) for values in batch))
    return Batch(*(values.pin_memory().to(device, non_blocking=True) for values in batch))


def attention_documents(batch: Batch, config: TrainConfig) -> Tensor | None:
    """Document numbers that confine attention, where `data.document_mask` asks for it."""
    return batch.document_BS if config.data.document_mask else None


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 autocast, or none for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
