"""Bytes that one GPU of a layout sends in one micro-batch, by what for."""

from dataclasses import dataclass

from remoe.distributed.config import ParallelConfig
from remoe.distributed.planning.job import Job, Parts
from remoe.distributed.planning.routes import rows_sent


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that leave one GPU in a micro-batch, over all layers, forward and backward."""

    all_to_all: float
    """Rows to the ranks of their experts and back (`parallel.expert`)."""
    gathers: float
    """Parameters gathered and gradients reduced among the ranks of one copy (FSDP2)."""
    replicas: float
    """Gradients summed over copies (HSDP)."""
    sequence: float
    """Tokens or heads exchanged around attention (`parallel.tensor`, `parallel.context`)."""


def traffic(job: Job, parallel: ParallelConfig, *, at_start: bool = False) -> Traffic:
    """Of one rank in the steady state, with top_k experts a token, or at the start."""
    return Traffic(
        all_to_all=_all_to_all(job, parallel, job.active_experts()[at_start]),
        gathers=sum(unit_traffic(job, parallel).values()),
        replicas=_replicas(job, parallel),
        sequence=_sequence(job, parallel),
    )


def unit_traffic(job: Job, parallel: ParallelConfig) -> dict[str, float]:
    """Of the gathers and reductions: those of experts, and of all other parameters, whose groups differ."""
    parts, moe_layers = Parts.of(job.model), job.model.num_moe_layers
    reduced = 2 if parallel.reduce == "bf16" else 4
    a_parameter = job.compute_bytes * (2 if parallel.reshard else 1) + reduced
    others = job.model.num_layers * parts.attention // parallel.tensor
    others += (job.model.num_layers - moe_layers) * parts.dense
    experts = moe_layers * parts.experts // parallel.expert
    ranks = parallel.shared_by
    return {
        "experts": _passed_on(ranks // parallel.expert) * a_parameter * experts,
        "others": _passed_on(ranks) * (a_parameter * others + 8 * parts.root),
    }


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
    if job.activation_checkpointing == "full" or in_parts:
        a_row += 2 * job.compute_bytes * model.hidden_size  # both ways again
    return model.num_moe_layers * tokens * rows_of_token * a_row * _passed_on(parallel.expert)


def _replicas(job: Job, parallel: ParallelConfig) -> float:
    shard = Parts.of(job.model).total / parallel.shared_by
    return 2 * _passed_on(parallel.data_replicate) * 4 * shard


def _sequence(job: Job, parallel: ParallelConfig) -> float:
    """Around each attention, there and back: tensor gathers hidden states and reduces them, context moves heads."""
    ranks, model = parallel.sequence_ranks, job.model
    if ranks == 1:
        return 0.0
    tokens = job.workload(parallel).num_tokens
    heads = model.head_width * (2 * model.num_heads + 2 * model.kv_heads)
    a_token = 2 * model.hidden_size * ranks if parallel.tensor > 1 else heads
    return 2 * model.num_layers * tokens * job.compute_bytes * a_token * _passed_on(ranks)
