"""The `parallel:` section: how the processes of one run share its model and its data."""

import math
from dataclasses import replace
from typing import Literal

from remoe.config import check_choice, check_range, config_class, setting
from remoe.errors import ConfigError
from remoe.model.config import ReMoEConfig
from remoe.moe.routers import router_class

Graph = Literal["whole", "known", "parts"]
SIZES = ("data_replicate", "expert", "tensor", "pipeline", "context")
WHOLE_SEQUENCES = ("lory",)
"""Routers that look at a whole sequence, so that ranks cannot share its tokens."""


@config_class
class ParallelConfig:
    """data_replicate * data_shard * tensor * context * pipeline processes: torchrun's world size. Ranks of the first
    two have rows of their own of every batch, those of the next two share the tokens of a sequence, those of the last
    one the layers of the model.
    """

    data_replicate: int = setting(1, "copies of the model (HSDP); 1: no copies")
    data_shard: int | str = setting("auto", "ranks that share the state of one copy (see sharded); auto: all there are")
    expert: int = setting(1, "ranks that share the experts of one layer; borrowed from the others")
    tensor: int = setting(1, "ranks that share attention's weights, by heads, and the tokens of a sequence elsewhere")
    pipeline: int = setting(1, "stages: ranks in a row, each with some of the layers; micro-batches pass through all")
    context: int = setting(1, "ranks that share the tokens of a sequence, for long ones")
    expert_rows: float = setting(
        2.0,
        "most rows at a rank's experts, over its tokens times their top_k; above it ranks tell each other how many "
        "they send, and tokens go in parts, twice",
    )
    sharded: str = setting(
        "parameters",
        "what the ranks of one copy share: parameters, gathered layer by layer (FSDP2), or only the optimizer's fp32 "
        "weights and state; then each holds weights and gradients whole, and exchanges both once a step (ZeRO-1)",
    )
    reshard: bool = setting(
        True, "let go of gathered parameters after the forward pass, and gather them again; for sharded parameters"
    )
    reduce: str = setting("fp32", "what gradients are summed over ranks in: fp32 or bf16")
    timeout: float = setting(600.0, "seconds after which a rank that others wait for ends the run")

    def __post_init__(self) -> None:
        for key in SIZES:
            check_range(f"parallel.{key}", getattr(self, key), 1)
        if self.data_shard != "auto":
            if isinstance(self.data_shard, str):
                raise ConfigError(f"parallel.data_shard is {self.data_shard!r}, must be auto or a number of ranks")
            check_range("parallel.data_shard", self.data_shard, 1)
        check_choice("parallel.reduce", self.reduce, ("fp32", "bf16"))
        check_choice("parallel.sharded", self.sharded, ("parameters", "optimizer"))
        if self.sharded == "optimizer" and (self.tensor > 1 or self.pipeline > 1):
            raise ConfigError(
                f"parallel.sharded is 'optimizer', but parallel.tensor is {self.tensor} and parallel.pipeline is "
                f"{self.pipeline}, must both be 1: with them no rank holds the model whole; set it to parameters"
            )
        if self.expert_rows <= 0:
            raise ConfigError(f"parallel.expert_rows is {self.expert_rows}, must be above 0; try 2")
        if self.timeout <= 0:
            raise ConfigError(f"parallel.timeout is {self.timeout}, must be above 0 seconds; try 600")
        if self.tensor > 1 and self.context > 1:
            raise ConfigError(
                f"parallel.tensor is {self.tensor} and parallel.context is {self.context}, one of them must be 1: both "
                "share the tokens of a sequence"
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

    @property
    def sequence_ranks(self) -> int:
        """Ranks that share the tokens of each sequence."""
        return self.tensor * self.context

    @property
    def graph(self) -> Graph:
        """What of a forward and backward pass can be one graph: "whole"; "known": all of it, once the number of rows of
        each layer is known beforehand; "parts": what lies between exchanges.
        """
        if self.shared_by * self.data_replicate * self.pipeline == 1:
            return "whole"
        if self.sharded == "parameters" or self.sequence_ranks > 1:
            return "parts"
        return "whole" if self.expert == 1 else "known"

    @property
    def shared_by(self) -> int:
        """Ranks that share the parameters of one copy: all have different tokens."""
        return self.shards * self.sequence_ranks


def resolve_parallel(parallel: ParallelConfig, world_size: int) -> ParallelConfig:
    """The section with `data_shard: auto` filled in. ConfigError where its sizes and the processes do not fit."""
    others = {key: getattr(parallel, key) for key in ("data_replicate", "tensor", "context", "pipeline")}
    others = {key: size for key, size in others.items() if size > 1 or key == "data_replicate"}
    product = math.prod(others.values())
    named = f"parallel.{' * '.join(others)} is {' * '.join(map(str, others.values()))}"
    if parallel.data_shard == "auto":
        if world_size % product:
            raise ConfigError(
                f"{named}, must divide the number of processes, which is {world_size}; change it, or --nproc-per-node "
                "of torchrun"
            )
        parallel = replace(parallel, data_shard=world_size // product)
    if product * parallel.shards != world_size:
        raise ConfigError(
            f"{named}, times data_shard = {parallel.shards} it must be the number of processes, which is {world_size}; "
            f"set parallel.data_shard to auto, or start torchrun with --nproc-per-node {product * parallel.shards}"
        )
    if parallel.shared_by % parallel.expert:
        raise ConfigError(
            f"parallel.expert is {parallel.expert}, must divide data_shard * tensor * context = {parallel.shared_by}, "
            "whose ranks it borrows"
        )
    return parallel


def check_model(parallel: ParallelConfig, model: ReMoEConfig, sequence_length: int) -> None:
    """ConfigError where ranks cannot share this model's experts, layers or sequences."""
    kind = getattr(router_class(model.moe.router_name), "experts", "grouped")
    check_experts(parallel, model.moe.routed_experts if model.num_moe_layers else 0, kind)
    check_layers(parallel, model.num_layers)
    check_sequence(parallel, model, sequence_length)


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


def own_micro_batch(ranks: int, batch_size: int, micro_batch_size: int | None, stages: int = 1) -> int:
    """Sequences of one rank's forward pass; where it is open, as many as leave a micro-batch for each stage.

    ConfigError where a batch cannot be shared evenly by the data ranks, or has fewer micro-batches than stages.
    """
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
    fewest = next((number for number in range(stages, own + 1) if own % number == 0), 0)
    size = micro_batch_size or (own // fewest if fewest else own)
    if own // size < stages:
        raise ConfigError(
            f"train.batch_size is {batch_size}, for {ranks} data ranks that is {own // size} micro-batches of {size}, "
            f"must be at least parallel.pipeline = {stages}, or stages would have nothing to do; lower "
            "train.micro_batch_size or raise train.batch_size"
        )
    return size


def check_layers(parallel: ParallelConfig, num_layers: int) -> None:
    """ConfigError where there are not enough layers for the stages."""
    if parallel.pipeline > num_layers:
        raise ConfigError(
            f"parallel.pipeline is {parallel.pipeline}, must be at most model.num_layers = {num_layers}: each stage "
            "needs a layer"
        )


def check_sequence(parallel: ParallelConfig, model: ReMoEConfig, sequence_length: int) -> None:
    """ConfigError where the ranks of `tensor` or `context` cannot share this model's sequences."""
    ranks, key = parallel.sequence_ranks, "tensor" if parallel.tensor > 1 else "context"
    if ranks == 1:
        return
    if sequence_length % ranks:
        raise ConfigError(f"parallel.{key} is {ranks}, must divide data.sequence_length = {sequence_length}")
    if model.num_heads % ranks or model.kv_heads % ranks:
        raise ConfigError(
            f"parallel.{key} is {ranks}, must divide model.num_heads = {model.num_heads} and model.num_kv_heads = "
            f"{model.kv_heads}: each rank attends with some heads"
        )
    if model.is_post_norm:
        raise ConfigError(f"parallel.{key} is {ranks}, must be 1 with model.block post_norm")
    name, options = model.moe.router_name, model.moe.router_options
    if model.num_moe_layers and (name in WHOLE_SEQUENCES or options.get("passing") == "shuffle"):
        raise ConfigError(f"parallel.{key} is {ranks}, must be 1 with router {name!r}, which looks at whole sequences")
