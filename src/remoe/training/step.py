"""One optimizer step: micro-batches forward and backward, one update, one move of the sparsity coefficient.

Nothing here waits for the device. A step whose loss or gradient is not finite is cancelled by a flag on the device:
weights, optimizer, coefficient and the routers' own running state stay as they were. So is a step in which a layer had
more rows than its capacity, with all steps after it, until the caller has them run again (see `ahead`).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from remoe.data import Batch
from remoe.data.sampler import NO_LABEL
from remoe.distributed.config import own_micro_batch
from remoe.distributed.ranks import Ranks
from remoe.moe import SparsityController, moe_layers
from remoe.training import router_hooks
from remoe.training.capacity import row_capacities
from remoe.training.compiled import compile_parts, compiled
from remoe.training.config import TrainConfig
from remoe.training.counts import RoutingCounts
from remoe.training.graphs import GraphedPass, Pass, check_capturable
from remoe.training.master_weights import MasterWeights
from remoe.training.micro_batch import Measured, MicroBatchLoss, Values, Weighing, split, to_device
from remoe.training.objective import Objective
from remoe.training.optimizer import build_optimizer, optimizer_step, optimizer_tensors
from remoe.training.router_hooks import Observed
from remoe.training.schedule import has_decayed, learning_rate
from remoe.training.shared_masters import SharedMasterWeights

if TYPE_CHECKING:
    from remoe.distributed.pipeline import Pipeline
    from remoe.training.pipelined import PipelinedStep


@dataclass
class Stepper:
    """Model, optimizer and controller of a run, and the rule that moves them by one step."""

    config: TrainConfig
    model: nn.Module
    device: torch.device
    ranks: Ranks = field(default_factory=Ranks)
    optimizer: torch.optim.AdamW = field(init=False)
    controller: SparsityController | None = field(init=False, default=None)
    row_capacities: Sequence[int] | None = field(init=False, default=None)
    """Rows of each MoE layer for one micro-batch in the next steps, or where ranks share experts both numbers of its
    `Capacity`, the same on all ranks; None: exact, as many as are needed."""
    overflowed: Tensor = field(init=False)
    """Bool: a step had more rows than its capacities allow. It and all later ones are cancelled until this is reset."""
    skipped: Tensor = field(init=False)
    """Steps so far that were cancelled because loss or gradient were not finite, int64."""
    skipped_in_a_row: Tensor = field(init=False)
    loads_LE: Tensor | None = field(init=False, default=None)
    """Loads of the last step that was not cancelled, for sparsity.loads = previous_step."""
    has_loads: Tensor = field(init=False)

    def __post_init__(self) -> None:
        loop = self.config.train
        model, pipeline = self.config.model, self.ranks.pipeline
        self.micro_batch = own_micro_batch(
            self.ranks.data_size, loop.batch_size, loop.micro_batch_size, pipeline.num_stages if pipeline else 1
        )
        all_routers: list[Any] = [layer.router for layer in moe_layers(self.model)]
        penalty = all_routers[0].penalty if all_routers else "none"
        self.ranks.place(self.model, self.device, torch.bfloat16 if loop.precision == "bf16" else None)
        self.masters = master_weights(self.model, self.ranks, loop.precision)
        self.weights = (
            self.masters.named_parameters(self.model) if self.masters else dict(self.model.named_parameters())
        )
        self.layers = moe_layers(self.model)
        self.has_shared_experts = any(layer.exchange is not None for layer in self.layers)
        self.routers: list[Any] = [layer.router for layer in self.layers]
        self.own_layers = pipeline.moe_layers(model) if pipeline else slice(0, model.num_moe_layers)
        self.objective = Objective(
            losses=self.config.losses,
            sparsity=self.config.sparsity,
            penalty=penalty,
            top_k=model.moe.routed_top_k,
            num_layers=model.num_moe_layers or None,
        )
        self.model.activation_checkpointing = self.config.train.activation_checkpointing  # pyright: ignore
        loss = self._build_loss()
        self.loss = loss
        self.compiled_loss = compiled(loss) if loop.compile and self.ranks.graph != "parts" else None
        if loop.compile and self.ranks.graph != "whole":
            compile_parts(self.model, has_whole_layers=self.ranks.shares is not None)
        self.pipelined = self._pipelined(loss, pipeline) if pipeline else None
        if loop.cuda_graphs:
            check_capturable(self.device, self.layers)
        self.graphed = GraphedPass(self._pass, self.device, self._zero_gradients) if loop.cuda_graphs else None
        self.optimizer = build_optimizer(self.weights.values(), self.config.optimizer)
        self.around_backward: Callable[[], AbstractContextManager[None]] = nullcontext
        self._knows_rows = False
        self.overflowed = torch.zeros((), dtype=torch.bool, device=self.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=self.device)
        self.has_loads = torch.zeros((), dtype=torch.bool, device=self.device)
        self.load_balancing_coef = torch.tensor(
            self.objective.load_balancing_coef, dtype=torch.float64, device=self.device
        )
        if penalty == "sparsity_l1":
            self.controller = build_controller(self.config, model.num_moe_layers).to(self.device)
        if penalty == "sparsity_l1" and uses_previous_loads(self.config):
            self.loads_LE = torch.zeros(model.num_moe_layers, model.moe.routed_experts, device=self.device)

    @property
    def has_graph(self) -> bool:
        """Whether passes are compiled as one graph, always or once their rows are known."""
        return self.compiled_loss is not None

    def run(self, batch: Batch, step: int) -> Values:
        """Train on this rank's rows of a batch as step number `step`; what all ranks measured, still on the device."""
        self.ranks.seed_step(self.config.seed, step)
        coef = self.controller.coef if self.controller else None
        self._zero_gradients()
        num_tokens = self.micro_batch * self.config.data.sequence_length // self.ranks.sequence_size
        with row_capacities(self.layers, self.row_capacities, num_tokens) as self._knows_rows:
            measured = self._forward_backward(batch, coef)
        if self.masters is not None:
            self.masters.complete_gradients()
        self.ranks.complete_gradients()
        values, observed = self.ranks.total(measured.values), self.ranks.total_of_layers(measured.observed)
        grad_norm = self.ranks.clip_gradients(self.weights.values(), self.config.optimizer.clip)
        is_bad = ~(grad_norm.isfinite() & values["loss"].isfinite())
        cancelled = self._cancelled(is_bad, measured.overflow)
        optimizer_step(self.optimizer, learning_rate(self.config.optimizer, step, self.config.train.steps), cancelled)
        self.update_model()
        self._count_skipped(is_bad)
        self._after_step(measured.counts, observed, cancelled, step)
        if coef is not None:
            values["sparsity_coef"] = coef
        if self.config.model.num_moe_layers:
            values["load_balancing_coef"] = self.load_balancing_coef
        values |= {"grad_norm": grad_norm, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        return values | self._rows_values(measured) | (routing_values(measured.counts) if measured.counts else {})

    def _forward_backward(self, batch: Batch, coef: Tensor | None) -> Measured:
        if not self.model.training:
            self.model.train()
        own_labels = int((batch.labels_BS != NO_LABEL).sum())  # ranks with the same rows each count all of them
        num_labels = max(1, self.ranks.total_number(own_labels) // self.ranks.same_rows)
        labels = torch.full((), num_labels, dtype=torch.float32, device=self.device)
        weighing = Weighing(labels, coef, self.loads_LE, self.has_loads)
        if self.pipelined is not None:
            return self.pipelined(to_device(batch, self.device), weighing)
        first, *others = split(batch, self.micro_batch)
        first = to_device(first, self.device)
        run = self._pass_for(first, weighing)
        whole = run(first, weighing)
        for part in others:
            whole = whole.plus(run(to_device(part, self.device), weighing))
        return whole

    def _pass_for(self, first: Batch, weighing: Weighing) -> Pass:
        """How a micro-batch is run: as a graph where one is wanted and the number of rows is known."""
        if self.graphed is None:
            return self._pass
        if self.layers and self.row_capacities is None:
            self.graphed.release()
            return self._pass
        self.graphed.prepare(self.row_capacities or (), first, weighing)
        return self.graphed

    def _pass(self, batch: Batch, weighing: Weighing) -> Measured:
        """Forward and backward of a micro-batch on the device."""
        is_one_graph = self.ranks.graph == "whole" or self._knows_rows
        loss = self.compiled_loss if self.compiled_loss is not None and is_one_graph else self.loss
        measured = loss(batch, weighing)
        with self.around_backward():
            measured.values["loss"].backward()
        return measured.detached()

    def _zero_gradients(self) -> None:
        """A graph adds to the memory it was captured with; otherwise only experts' sums take some between steps."""
        self.optimizer.zero_grad(set_to_none=self.graphed is None)
        if self.masters is not None:
            self.masters.zero_sums()

    def _build_loss(self) -> MicroBatchLoss:
        share = self.micro_batch / (self.config.train.batch_size * self.ranks.sequence_size)
        return MicroBatchLoss(
            self.config, self.model, self.device, self.objective, self.routers, self.ranks, share
        )  # fmt: skip

    def _pipelined(self, loss: MicroBatchLoss, pipeline: "Pipeline") -> "PipelinedStep":
        from remoe.training.pipelined import PipelinedStep  # torch's schedules take a while to import

        rows = self.config.train.batch_size // self.ranks.data_size
        return PipelinedStep(loss, pipeline, rows // self.micro_batch, self.own_layers)

    def _cancelled(self, is_bad: Tensor, overflow: Tensor | None) -> Tensor:
        """Whether the step must leave no trace: not finite, or void for want of rows, its own or an earlier step's."""
        if overflow is None and self.ranks.size == 1:
            return is_bad | self.overflowed
        own = torch.zeros_like(self.overflowed) if overflow is None else overflow  # ranks need not overflow together
        self.overflowed |= self.ranks.total({"overflow": own.to(torch.int64)})["overflow"] > 0
        return is_bad | self.overflowed

    def _count_skipped(self, is_bad: Tensor) -> None:
        """A step that is void is run again, and counts then."""
        self.skipped += is_bad & ~self.overflowed
        self.skipped_in_a_row = torch.where(
            self.overflowed, self.skipped_in_a_row, (self.skipped_in_a_row + 1) * is_bad
        )

    def _rows_values(self, measured: Measured) -> Values:
        """What the choice of row capacities needs to know of a step."""
        if measured.needs_C is None:
            return {}
        return {"overflowed": self.overflowed, "needs": self.capacity_needs(measured.needs_C)}

    def capacity_needs(self, own_C: Tensor) -> Tensor:
        """What this rank's row capacities must hold: where ranks share experts, and so capacities, the most of all."""
        return self.ranks.largest_of_layers(own_C) if self.has_shared_experts else own_C

    @torch.no_grad()
    def _after_step(self, counts: RoutingCounts | None, observed: Observed, skipped: Tensor, step: int) -> None:
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
        router_hooks.after_step(self.routers, counts.of_layers(self.own_layers), observed, skipped, step)

    def update_model(self) -> None:
        """Let the model follow its fp32 weights, after they have changed."""
        if self.masters is not None:
            self.masters.update_model()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name: live tensors that a checkpoint is read into in place.

        `update_model` makes the model follow.
        """
        model = model_tensors(self.model) | {f"model.{name}": weight for name, weight in self.weights.items()}
        optimizer = {f"optimizer.{n}": value for n, value in optimizer_tensors(self.weights, self.optimizer).items()}
        progress = {"progress.skipped": self.skipped, "progress.skipped_in_a_row": self.skipped_in_a_row}
        if self.controller is not None:
            progress |= {f"sparsity.{name}": value for name, value in self.controller.state_dict().items()}
        if self.loads_LE is not None:
            progress |= {"sparsity.loads": self.loads_LE, "sparsity.has_loads": self.has_loads}
        return model | optimizer | progress


def master_weights(model: nn.Module, ranks: Ranks, precision: str) -> MasterWeights | SharedMasterWeights | None:
    """fp32 weights beside a placed model, where it does not hold them itself."""
    if ranks.shares is not None:
        return SharedMasterWeights(model, ranks.shares, is_rounded=precision == "bf16")
    return MasterWeights(model) if precision == "bf16" and ranks.size == 1 else None  # FSDP rounds as it gathers


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
