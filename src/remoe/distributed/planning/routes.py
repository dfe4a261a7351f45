"""How many ranks a token's experts lie on."""

from math import comb

from remoe.distributed.config import ParallelConfig
from remoe.distributed.planning.job import Job


def rows_sent(job: Job, parallel: ParallelConfig, active_experts: float) -> float:
    """Rows that a token is sent as: the mean number of ranks with an expert for it, where all are equally likely."""
    experts, own = job.model.moe.routed_experts, job.model.moe.routed_experts // parallel.expert
    active = min(round(active_experts), experts)
    missed = comb(experts - own, active) / comb(experts, active)
    return parallel.expert * (1 - missed)
