"""The `parallel:` section: how the processes of one run share its model and its data."""

from dataclasses import replace

from remoe.config import check_choice, check_range, config_class, setting
from remoe.errors import ConfigError

NOT_YET = ("tensor", "pipeline", "context")
"""Sizes that the section has and that must be 1: there is no code behind them yet."""


@config_class
class ParallelConfig:
    """data_replicate * data_shard processes (torchrun's world size), each with its own rows of every batch."""

    data_replicate: int = setting(1, "copies of the model (HSDP); 1: no copies")
    data_shard: int | str = setting("auto", "ranks that share the parameters of one copy (FSDP2); auto: all there are")
    expert: int = setting(1, "ranks that share the experts of one layer; borrowed from data_shard")
    tensor: int = setting(1, "must be 1 for now")
    pipeline: int = setting(1, "must be 1 for now")
    context: int = setting(1, "must be 1 for now")
    reshard: bool = setting(True, "let go of gathered parameters after the forward pass, and gather them again")
    reduce: str = setting("fp32", "what gradients are summed over ranks in: fp32 or bf16")
    timeout: float = setting(600.0, "seconds after which a rank that others wait for ends the run")

    def __post_init__(self) -> None:
        for key in ("data_replicate", "expert", *NOT_YET):
            check_range(f"parallel.{key}", getattr(self, key), 1)
        if self.data_shard != "auto":
            if isinstance(self.data_shard, str):
                raise ConfigError(f"parallel.data_shard is {self.data_shard!r}, must be auto or a number of ranks")
            check_range("parallel.data_shard", self.data_shard, 1)
        check_choice("parallel.reduce", self.reduce, ("fp32", "bf16"))
        if self.timeout <= 0:
            raise ConfigError(f"parallel.timeout is {self.timeout}, must be above 0 seconds; try 600")
        for key in NOT_YET:
            if getattr(self, key) != 1:
                raise ConfigError(
                    f"parallel.{key} is {getattr(self, key)}, must be 1: this version shares work over "
                    "parallel.data_replicate, data_shard and expert only"
                )

    @property
    def shards(self) -> int:
        """data_shard as a number; only once it is resolved."""
        assert isinstance(self.data_shard, int), "resolve the section first"
        return self.data_shard

    @property
    def data_ranks(self) -> int:
        """Ranks with rows of their own: data_replicate * data_shard."""
        return self.data_replicate * self.shards


def resolve_parallel(parallel: ParallelConfig, world_size: int) -> ParallelConfig:
    """The section with `data_shard: auto` filled in. ConfigError where its sizes and the processes do not fit."""
    copies = parallel.data_replicate
    if parallel.data_shard == "auto":
        if world_size % copies:
            raise ConfigError(
                f"parallel.data_replicate is {copies}, must divide the number of processes, which is {world_size}; "
                "change it, or --nproc-per-node of torchrun"
            )
        parallel = replace(parallel, data_shard=world_size // copies)
    if parallel.data_ranks != world_size:
        raise ConfigError(
            f"parallel.data_replicate * data_shard is {copies} * {parallel.shards} = {parallel.data_ranks}, must be "
            f"the number of processes, which is {world_size}; set parallel.data_shard to auto, or start torchrun with "
            f"--nproc-per-node {parallel.data_ranks}"
        )
    if parallel.shards % parallel.expert:
        raise ConfigError(
            f"parallel.expert is {parallel.expert}, must divide parallel.data_shard = {parallel.shards}, whose ranks "
            "it borrows"
        )
    return parallel


def check_experts(parallel: ParallelConfig, num_experts: int, kind: str) -> None:
    """ConfigError where a layer's experts cannot be shared by `parallel.expert` ranks; 0 experts: a dense model."""
    ranks = parallel.expert
    if ranks == 1:
        return
    if num_experts == 0:
        raise ConfigError(f"parallel.expert is {ranks}, must be 1: no layer of this model has experts")
    if kind == "merged":
        raise ConfigError(f"parallel.expert is {ranks}, must be 1 for a router that merges experts (lory)")
    if num_experts % ranks:
        raise ConfigError(
            f"parallel.expert is {ranks}, must divide the number of experts, num_experts * granularity = {num_experts}"
        )


def own_micro_batch(ranks: int, batch_size: int, micro_batch_size: int | None) -> int:
    """Sequences of one rank's forward pass. ConfigError where a batch cannot be shared evenly by the data ranks."""
    if batch_size % ranks:
        raise ConfigError(
            f"train.batch_size is {batch_size}, must be a multiple of the {ranks} data ranks, which share it"
        )
    own = batch_size // ranks
    if own % (micro_batch_size or own):
        raise ConfigError(
            f"train.micro_batch_size is {micro_batch_size}, must divide train.batch_size / data ranks = "
            f"{batch_size} / {ranks} = {own}"
        )
    return micro_batch_size or own
