"""Bytes that one GPU of a layout sends in one micro-batch, by what for."""

from dataclasses import astuple, dataclass
from typing import NamedTuple

from remoe.distributed.config import ParallelConfig
from remoe.distributed.planning.job import Job
from remoe.distributed.planning.routes import rows_sent

PADDED = 9 / 8
"""Rows that are exchanged without waiting, over those that are needed: the margin of row capacities."""
HANDED_BYTES = 4
"""Hidden states, router states and the loss so far go from stage to stage in fp32."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that leave one GPU in a micro-batch, over all its layers, forward and backward."""

    all_to_all: float
    """Rows to the ranks of their experts and back (`parallel.expert`)."""
    gathers: float
    """Parameters gathered and gradients reduced among the ranks of one copy."""
    replicas: float
    """Gradients summed over copies (HSDP)."""
    sequence: float
    """Tokens or heads exchanged around attention (`parallel.tensor`, `parallel.context`)."""
    stages: float
    """What the next stage needs, and the gradients of what the one before sent (`parallel.pipeline`)."""


class Units(NamedTuple):
    """Bytes of gathers and of reductions."""

    gathered: float
    reduced: float


def traffic(job: Job, parallel: ParallelConfig, *, at_start: bool = False) -> Traffic:
    """Of the busiest rank in the steady state, with top_k experts a token, or at the start."""
    handed = handed_bytes(job, parallel)
    found = [stage_traffic(stage.job, parallel, handed, at_start=at_start) for stage in job.stages(parallel.pipeline)]
    return max(found, key=lambda one: sum(astuple(one)))


def stage_traffic(job: Job, parallel: ParallelConfig, handed: float, *, at_start: bool = False) -> Traffic:
    """Of one rank of a stage, or without a pipeline of the model; each neighbour gets `handed` bytes."""
    return Traffic(
        all_to_all=_all_to_all(job, parallel, job.active_experts[at_start]),
        gathers=sum(sum(units) for units in unit_traffic(job, parallel).values()),
        replicas=_replicas(job, parallel),
        sequence=_sequence(job, parallel),
        stages=job.num_neighbours * handed,
    )


def unit_traffic(job: Job, parallel: ParallelConfig) -> dict[str, Units]:
    """Of the gathers and reductions: those of experts, and of all other parameters, whose groups differ."""
    parts, moe_layers = job.parts, job.model.num_moe_layers
    gathers, steps = _gathers(job, parallel), _reductions(job, parallel)
    reduced = 2 if parallel.reduce == "bf16" else 4
    others = job.model.num_layers * parts.attention // parallel.tensor
    others += (job.model.num_layers - moe_layers) * parts.dense
    experts = moe_layers * parts.experts // parallel.expert
    to_experts, to_others = _passed_on(parallel.shared_by // parallel.expert), _passed_on(parallel.shared_by)
    return {
        "experts": Units(to_experts * gathers * job.compute_bytes * experts, to_experts * steps * reduced * experts),
        "others": Units(
            to_others * (gathers * job.compute_bytes * others + steps * 4 * parts.root),
            to_others * steps * (reduced * others + 4 * parts.root),
        ),
    }


def handed_bytes(job: Job, parallel: ParallelConfig) -> int:
    """What one stage sends the next for a micro-batch, or gets back for it: hidden states, router state and loss."""
    return HANDED_BYTES * (job.workload(parallel).num_tokens * (job.model.hidden_size + job.state_size) + 1)


def _gathers(job: Job, parallel: ParallelConfig) -> float:
    """How often a layer's parameters are gathered in a micro-batch, on average.

    A pipeline keeps them after each backward pass, until the next forward pass lets go of them: a gather for each
    backward pass but one, and for the forward passes before the first of them. Ranks that share the optimizer only
    gather all once a step.
    """
    if parallel.sharded == "optimizer":
        return _reductions(job, parallel)
    if parallel.pipeline == 1:
        return 2 if parallel.reshard else 1
    in_step = job.num_micro_batches(parallel) + 1 if parallel.reshard else 1
    return in_step * _reductions(job, parallel)


def _reductions(job: Job, parallel: ParallelConfig) -> float:
    """How often gradients are reduced in a micro-batch: in a pipeline, or where ranks hold them whole, once a step."""
    is_once = parallel.pipeline > 1 or parallel.sharded == "optimizer"
    return 1 / job.num_micro_batches(parallel) if is_once else 1


def _passed_on(ranks: int) -> float:
    """The part of a whole that each rank passes on where all gather or reduce it."""
    return (ranks - 1) / ranks


def _all_to_all(job: Job, parallel: ParallelConfig, active_experts: int) -> float:
    """A token's hidden state to each rank of its experts, their sum back, and both gradients; with gates and map."""
    if parallel.expert == 1:
        return 0.0
    model, tokens = job.model, job.workload(parallel).num_tokens
    own_experts = model.moe.routed_experts // parallel.expert
    a_row = 4 * job.compute_bytes * model.hidden_size + own_experts * (1 + 2 * 4)
    rows_of_token = rows_sent(job, parallel, active_experts)
    in_parts = rows_of_token > parallel.expert_rows * model.moe.routed_top_k
    if job.is_one_graph(parallel):
        rows_of_token *= PADDED
    if job.activation_checkpointing == "full" or in_parts:
        a_row += 2 * job.compute_bytes * model.hidden_size  # both ways again
    return model.num_moe_layers * tokens * rows_of_token * a_row * _passed_on(parallel.expert)


def _replicas(job: Job, parallel: ParallelConfig) -> float:
    shard = job.parts.total / parallel.shared_by
    return 2 * _passed_on(parallel.data_replicate) * 4 * shard * _reductions(job, parallel)


def _sequence(job: Job, parallel: ParallelConfig) -> float:
    """Around each attention, there and back: tensor gathers hidden states and reduces them, context moves heads."""
    ranks, model = parallel.sequence_ranks, job.model
    if ranks == 1:
        return 0.0
    tokens = job.workload(parallel).num_tokens
    heads = model.head_width * (2 * model.num_heads + 2 * model.kv_heads)
    a_token = 2 * model.hidden_size * ranks if parallel.tensor > 1 else heads
    return 2 * model.num_layers * tokens * job.compute_bytes * a_token * _passed_on(ranks)
