"""Seconds of an optimizer step: products and traffic at the machine's rates, and what of the exchanges is not hidden.

Gathers and reductions of FSDP run beside the computation, so only what is longer than it counts; exchanges around
experts and attention, those between stages, and those of an optimizer that alone is shared are waited for.
"""

from dataclasses import dataclass
from typing import NamedTuple

from remoe.distributed.config import ParallelConfig
from remoe.distributed.planning.job import Job
from remoe.distributed.planning.machine import Machine
from remoe.distributed.planning.traffic import Traffic, handed_bytes, stage_traffic, unit_traffic
from remoe.kernels.expert_mlp.chunks import chunks_of
from remoe.moe.experts import row_cap

OPTIMIZER_BYTES = 36
"""A parameter's step of AdamW in fp32: weight, gradient and two moments read, three written, the gradient's norm read
and its memory cleared."""
COMPUTED_AGAIN = 2 / 9
"""Of a layer's products: the backward pass makes the first ones of rows that were not kept again."""
TRAINED = 3
"""A product's forward pass and its two gradients."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step on one GPU; in a pipeline one of the stage that takes longest."""

    compute: float
    """Of all micro-batches; of a layer at least as long as the host takes to launch it."""
    exchanges: float
    """Waited for: rows to experts and back, tokens around attention, micro-batches from stage to stage."""
    gathers: float
    """Parameters and gradients, as far as the computation does not hide them."""
    bubble: float
    """1F1B: until the first micro-batch has come to this stage, and after the last one has left it."""
    optimizer: float
    total: float


class MicroBatchTime(NamedTuple):
    """Seconds of one micro-batch in one stage."""

    compute: float
    exchanges: float
    gathers: float
    reduction: float
    """Its share of what is reduced once, after the last one."""

    @property
    def total(self) -> float:
        """From getting it until the next one can come."""
        return self.compute + self.exchanges + self.gathers


def step_time(job: Job, parallel: ParallelConfig, gpus: Machine, *, at_start: bool = False) -> StepTime:
    """Of a layout in the steady state, with top_k experts a token, or at the start.

    The first micro-batch goes through all stages, there and back; the others follow at the slowest one's pace. Of m
    micro-batches through p stages that take equally long, that is m + p - 1 times one in one stage. Where stages differ
    1F1B is faster, by up to p - 1 times the difference.
    """
    stages, handed = job.stages(parallel.pipeline), handed_bytes(job, parallel)
    times = [_micro_batch_time(stage.job, parallel, gpus, handed, at_start) for stage in stages]
    slowest = max(times, key=lambda one: one.total)
    bubble = sum(stage.num_alike * one.total for stage, one in zip(stages, times, strict=True)) - slowest.total
    optimizer = OPTIMIZER_BYTES * max(_shard(stage.job, parallel) for stage in stages) / gpus["memory_rate"]
    num = job.num_micro_batches(parallel)
    reduction = num * slowest.reduction
    return StepTime(
        compute=num * slowest.compute,
        exchanges=num * slowest.exchanges,
        gathers=num * slowest.gathers + reduction,
        bubble=bubble,
        optimizer=optimizer,
        total=num * slowest.total + bubble + reduction + optimizer,
    )


def _micro_batch_time(
    job: Job, parallel: ParallelConfig, gpus: Machine, handed: float, at_start: bool
) -> MicroBatchTime:  # fmt: skip
    compute = _compute_seconds(job, parallel, gpus, job.active_experts[at_start])
    sent = stage_traffic(job, parallel, handed, at_start=at_start)
    exchanges = _exchange_seconds(sent, job, parallel, gpus)
    return MicroBatchTime(compute, exchanges, *_gather_seconds(sent, job, parallel, gpus, compute))


def _shard(job: Job, parallel: ParallelConfig) -> float:
    """Parameters that a rank's optimizer moves."""
    return job.parts.total / parallel.shared_by


def layer_seconds(tokens: float, sizes: tuple[int, int, int, float], gpus: Machine, width: int = 2) -> float:
    """One expert layer, forward and backward: (hidden, expert's width, experts here, experts a token) = sizes.

    Its products, passes over the rows' values, and its weights once each way with their gradients; the rates are
    fitted to measured layers (benchmarks/plan_constants.py).
    """
    hidden, ffn, experts, active = sizes
    products = TRAINED * 2 * 3 * tokens * active * hidden * ffn
    rows = gpus["expert_row_passes"] * tokens * active * (hidden + ffn) * width
    weights = TRAINED * width * 3 * experts * hidden * ffn
    return products / gpus["expert_products"] + (rows + weights) / gpus["memory_rate"]


def _compute_seconds(job: Job, parallel: ParallelConfig, gpus: Machine, active: int) -> float:
    """One micro-batch."""
    model = job.model
    tokens, layers, moe_layers = job.workload(parallel).num_tokens, model.num_layers, model.num_moe_layers
    is_one_graph = job.is_one_graph(parallel)
    attention, sparse = _attention_seconds(job, tokens, gpus, is_one_graph), _moe_seconds(job, parallel, gpus, active)
    dense = layer_seconds(tokens, (model.hidden_size, model.intermediate_size, 1, 1), gpus, job.compute_bytes)
    again = {"full": (4 / 3, 4 / 3), "selective": (4 / 3, 1.0)}.get(job.activation_checkpointing, (1.0, 1.0))
    attention, sparse, dense = attention * again[0], sparse * again[1], dense * again[0]
    if not is_one_graph:
        attention = max(attention, gpus["attention_host"])
        sparse, dense = max(sparse, gpus["expert_host"]), max(dense, gpus["dense_host"])
    blocks = layers * attention + moe_layers * sparse + (layers - moe_layers) * dense
    return blocks + _head_seconds(job, tokens, gpus)


def _head_seconds(job: Job, tokens: float, gpus: Machine) -> float:
    """Output head and loss: products, and passes over the logits."""
    logits = tokens * (job.model.vocab_size or 0)
    passes = gpus["logit_passes"] * logits * job.compute_bytes
    return TRAINED * 2 * logits * job.model.hidden_size / gpus["products"] + passes / gpus["memory_rate"]


def _attention_seconds(job: Job, tokens: float, gpus: Machine, is_one_graph: bool) -> float:
    """Projections, causal scores (half of all pairs; the backward pass computes them again), norms and residuals."""
    model = job.model
    projections = TRAINED * 2 * tokens * job.parts.attention
    scores = 3.5 * 2 * tokens * job.sequence_length * model.head_width * model.num_heads
    passes = gpus["block_passes" if is_one_graph else "eager_block_passes"]
    elementwise = passes * tokens * model.hidden_size * job.compute_bytes
    return projections / gpus["products"] + scores / gpus["attention_products"] + elementwise / gpus["memory_rate"]


def _moe_seconds(job: Job, parallel: ParallelConfig, gpus: Machine, active: int) -> float:
    moe, workload = job.model.moe, job.workload(parallel)
    if job.model.num_moe_layers == 0:
        return 0.0
    tokens = workload.num_tokens
    sizes = (moe.hidden_size, moe.expert_size, moe.routed_experts // parallel.expert, active)
    experts = layer_seconds(tokens, sizes, gpus, job.compute_bytes)
    experts += _chunk_seconds(experts, tokens, row_cap(moe.kept_rows_per_token, tokens), sizes, gpus)
    busiest = gpus["expert_imbalance"] if parallel.expert > 1 else 1.0
    router = TRAINED * 2 * tokens * moe.hidden_size * moe.routed_experts / gpus["fp32_products"]
    return busiest * experts + router


def _chunk_seconds(experts: float, tokens: int, cap: int, sizes: tuple[int, int, int, int], gpus: Machine) -> float:
    """What rows above the cap cost beyond their products: those of rows that were not kept are made again, and each
    chunk reads and writes fp32 sums, of the matrices' gradients, the output and the tokens' gradients. Of the latter
    two the first finds none to read, and the last leaves none.
    """
    hidden_size, expert_size, num_experts, active = sizes
    num_rows = active * tokens
    kept, *others = chunks_of(num_rows, cap, hidden_size, expert_size)
    if not others:
        return 0.0
    num_chunks = 1 + len(others)
    of_tokens, of_matrices = 2 * tokens * hidden_size, 3 * num_experts * hidden_size * expert_size
    sums = 2 * (num_chunks - 1) * of_tokens + 2 * num_chunks * of_matrices
    again = (1 - kept.size / num_rows) * COMPUTED_AGAIN * experts
    return again + 4 * sums / gpus["memory_rate"]


def _exchange_seconds(sent: Traffic, job: Job, parallel: ParallelConfig, gpus: Machine) -> float:
    seconds = gpus.exchange_seconds(sent.all_to_all, parallel.expert)
    if parallel.expert > 1 and not job.is_one_graph(parallel):
        seconds += job.model.num_moe_layers * gpus["exchange_wait"]
    seconds += gpus.exchange_seconds(sent.sequence, parallel.sequence_ranks)
    return seconds + gpus.pass_seconds(sent.stages, parallel.pipeline, parallel.data_replicate * parallel.shared_by)


def _gather_seconds(
    sent: Traffic, job: Job, parallel: ParallelConfig, gpus: Machine, compute: float
) -> tuple[float, float]:  # fmt: skip
    """What the computation does not hide, and what comes after the last backward pass: in a pipeline the reduction,
    of an optimizer that alone is shared all.
    """
    units, ranks = unit_traffic(job, parallel), parallel.shared_by
    gathered, reduced = (
        gpus.gather_seconds(experts, ranks // parallel.expert, parallel.expert) + gpus.gather_seconds(others, ranks)
        for experts, others in zip(units["experts"], units["others"], strict=True)
    )
    reduced += gpus.gather_seconds(sent.replicas, parallel.data_replicate, ranks)
    if parallel.sharded == "optimizer":
        return 0.0, gathered + reduced
    if parallel.pipeline > 1:
        return max(0.0, gathered - compute), reduced
    return max(0.0, gathered + reduced - compute), 0.0
