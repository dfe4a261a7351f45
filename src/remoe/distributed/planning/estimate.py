"""The cost of each layout that a number of GPUs allows, the fastest that fits first."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from remoe.distributed.config import ParallelConfig
from remoe.distributed.planning.job import Job
from remoe.distributed.planning.machine import Machine
from remoe.distributed.planning.memory import GpuMemory, gpu_memory
from remoe.distributed.planning.step_time import StepTime, step_time
from remoe.distributed.planning.traffic import Traffic, traffic

SEQUENCE_RANKS = (1, 2, 4, 8)
"""Sizes of `tensor` and `context`: their exchanges are waited for, so they stay within a host."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one layout is expected to cost on each GPU."""

    parallel: ParallelConfig
    micro_batch_size: int
    memory: GpuMemory
    traffic: Traffic
    """Of a micro-batch."""
    step_seconds: StepTime
    start_step_seconds: StepTime
    """Of the first steps, when ReLU routing has half of all gates open."""
    tokens_per_second: float
    """Over all GPUs."""
    fits: bool
    """At its start too, with what is set aside for everything else."""


def estimate(job: Job, parallel: ParallelConfig, gpus: Machine) -> Estimate:
    """What a layout of `Job.layout` costs on these GPUs."""
    memory, seconds = gpu_memory(job, parallel), step_time(job, parallel, gpus)
    return Estimate(
        parallel=parallel,
        micro_batch_size=job.micro_batch(parallel),
        memory=memory,
        traffic=traffic(job, parallel),
        step_seconds=seconds,
        start_step_seconds=step_time(job, parallel, gpus, at_start=True),
        tokens_per_second=job.tokens / seconds.total,
        fits=memory.peak <= gpus["memory"] - gpus["memory_set_aside"],
    )


def estimates(job: Job, num_gpus: int, gpus: Machine) -> list[Estimate]:
    """Of every layout that model and batch allow on so many GPUs: those that fit, the fastest first, then the rest."""
    found = [estimate(job, parallel, gpus) for parallel in layouts(job, num_gpus)]
    return sorted(found, key=lambda one: (not one.fits, one.step_seconds.total))


def layouts(job: Job, num_gpus: int) -> Iterator[ParallelConfig]:
    """The sizes that model and batch allow: stages, copies, tensor or context, experts; the rest is sharded, all
    parameters or only the optimizer.
    """
    sizes = [size for size in range(1, num_gpus + 1) if num_gpus % size == 0]
    sequences = [("tensor", 1), *((key, size) for key in ("tensor", "context") for size in SEQUENCE_RANKS[1:])]
    stages = [size for size in sizes if size <= job.model.num_layers]
    kinds = ("parameters", "optimizer") if num_gpus > 1 else ("parameters",)
    for pipeline, copies, (key, ranks), expert, sharded in product(stages, sizes, sequences, sizes, kinds):
        named = {"pipeline": pipeline, "data_replicate": copies, "expert": expert, key: ranks}
        parallel = job.layout(num_gpus, sharded, **named)
        if parallel is not None and (sharded == "parameters" or parallel.shared_by > 1):
            yield parallel
