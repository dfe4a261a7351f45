"""Bytes on one GPU of a layout: its share of the state, what is gathered at once, and activations."""

from dataclasses import dataclass

from remoe.distributed.config import ParallelConfig
from remoe.distributed.planning.job import Job, Stage
from remoe.distributed.planning.routes import rows_sent
from remoe.distributed.planning.traffic import handed_bytes

STATE_BYTES = 16
"""A parameter in fp32, its gradient, and AdamW's two moments."""
GRADIENT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """Bytes on one GPU at the peak of a step."""

    state: int
    gathered: int
    """Parameters and gradients of FSDP units that are whole at the same time, with the buffers of their exchange; or of
    all parameters, where ranks share the optimizer only."""
    received: int
    """A stage's buffers for what the others send it, one for each micro-batch of a step and direction."""
    activations: int
    """In a pipeline of as many micro-batches as are under way in the stage."""
    activations_at_start: int
    """ReLU routing starts with half of all gates open."""
    total: int
    total_at_start: int

    @property
    def peak(self) -> int:
        """Over the whole run."""
        return max(self.total, self.total_at_start)


def gpu_memory(job: Job, parallel: ParallelConfig) -> GpuMemory:
    """Of the rank of a layout that needs most; other allocations (context, NCCL, fragments) are not in it."""
    found = [_stage_memory(stage, parallel, job) for stage in job.stages(parallel.pipeline)]
    return max(found, key=lambda one: one.peak)


def _stage_memory(stage: Stage, parallel: ParallelConfig, whole: Job) -> GpuMemory:
    job = stage.job
    under_way = min(parallel.pipeline - stage.first, job.num_micro_batches(parallel))  # 1F1B: the first stage has most
    kept = job.memory(job.workload(parallel), under_way)
    if parallel.data_replicate * parallel.shared_by * parallel.pipeline == 1:
        state, gathered = STATE_BYTES * job.parts.total, kept.compute_copies
    elif parallel.sharded == "optimizer":
        state, gathered = _state_of_optimizer(job, parallel), _held(job, parallel)
    else:
        state, gathered = STATE_BYTES * job.parts.total // parallel.shared_by, _gathered(job, parallel)
    sent, sent_at_start = (_exchanged(job, parallel, active) for active in job.active_experts)
    activations, at_start = kept.activations + sent, kept.activations_at_start + sent_at_start
    received = job.num_neighbours * job.num_micro_batches(parallel) * handed_bytes(whole, parallel)
    fixed = state + gathered + received
    return GpuMemory(
        state=state,
        gathered=gathered,
        received=received,
        activations=activations,
        activations_at_start=at_start,
        total=fixed + activations,
        total_at_start=fixed + at_start,
    )


def _state_of_optimizer(job: Job, parallel: ParallelConfig) -> int:
    """A part of the fp32 weights and moments; gradients are whole, and their sums come when activations are gone."""
    return (STATE_BYTES - GRADIENT_BYTES) * job.parts.total // parallel.shared_by


def _held(job: Job, parallel: ParallelConfig) -> int:
    """Weights as products take them, those of the root in fp32, and gradients in fp32."""
    root, layers = job.parts.root, sum(_units(job, parallel))
    return 4 * root + job.compute_bytes * layers + GRADIENT_BYTES * (root + layers)


def _gathered(job: Job, parallel: ParallelConfig) -> int:
    """The root in fp32 with its gradient; the largest unit, the one gathered ahead of it, and the largest's gradient.

    A gather needs its result once more as a buffer, a reduction its input in the dtype that it sums in. In a pipeline
    all units stay after a backward pass, and their gradients add up in that dtype until the step ends.
    """
    width, reduced = job.compute_bytes, 2 if parallel.reduce == "bf16" else 4
    units = sorted(_units(job, parallel), reverse=True)
    root = 2 * 4 * job.parts.root
    if parallel.pipeline > 1:
        return root + (width + reduced) * sum(units) + width * units[0]
    if not parallel.reshard:
        return root + width * sum(units) + (width + reduced) * units[0]
    return root + width * (units[0] + units[1]) + width * units[0] + (width + reduced) * units[0]


def _units(job: Job, parallel: ParallelConfig) -> list[int]:
    """Parameters of each FSDP unit as one rank gathers it."""
    parts, moe_layers = job.parts, job.model.num_moe_layers
    experts = [parts.experts // parallel.expert] * moe_layers
    dense = [parts.dense] * (job.model.num_layers - moe_layers)
    return [*experts, *dense, *[parts.attention // parallel.tensor] * job.model.num_layers]


def _exchanged(job: Job, parallel: ParallelConfig, active_experts: float) -> int:
    """Rows of one layer on their way: sent and received, there and back, one layer at a time, within the budget."""
    if parallel.expert == 1 or job.model.num_moe_layers == 0:
        return 0
    budget = parallel.expert_rows * job.model.moe.routed_top_k
    rows = min(budget, rows_sent(job, parallel, active_experts)) * job.workload(parallel).num_tokens
    return round(4 * rows * job.compute_bytes * job.model.hidden_size)
