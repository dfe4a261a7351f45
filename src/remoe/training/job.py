"""A run as what `distributed.planning` estimates the cost of."""

from remoe.distributed.planning import Job
from remoe.model.recompute import recomputation
from remoe.training.config import TrainConfig


def job_of(config: TrainConfig) -> Job:
    """Of a run whose model has its vocabulary."""
    loop = config.train
    return Job(
        model=config.model,
        batch_size=loop.batch_size,
        micro_batch_size=loop.micro_batch,
        sequence_length=config.data.sequence_length,
        precision=loop.precision,
        activation_checkpointing=recomputation("train.activation_checkpointing", loop.activation_checkpointing),
        is_compiled=loop.cuda_graphs or loop.compile,
        parallel=config.parallel,
    )
