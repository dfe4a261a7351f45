"""What is to be trained, as far as its cost depends on it."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from remoe.distributed.config import SIZES, ParallelConfig, check_model, own_micro_batch, resolve_parallel
from remoe.distributed.planning.parts import Parts
from remoe.errors import ConfigError
from remoe.model.config import ReMoEConfig, router_without_values
from remoe.model.part import layers_of_part
from remoe.model.size import Memory, Workload, active_at_start, plan


@dataclass(frozen=True, kw_only=True)
class Job:
    """One optimizer step of a model with a vocabulary, or of a stage's layers as a model of their own;
    `micro_batch_size` is the most that a rank takes at once.
    """

    model: ReMoEConfig
    batch_size: int
    micro_batch_size: int
    sequence_length: int
    precision: str = "bf16"
    activation_checkpointing: str = "none"
    is_compiled: bool = False
    """Steps are launched as a whole (train.compile, train.cuda_graphs), in layouts whose ranks let them: the host does
    not hold the device up there."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Sizes that are planned are replaced, and `sharded`; `reshard` and `reduce` hold for all layouts."""
    has_embedding: bool = True
    has_head: bool = True
    """False for stages that leave final norm and output head to the last one."""

    @property
    def num_neighbours(self) -> int:
        """Stages that it exchanges micro-batches with: one for those at the ends; none without a pipeline."""
        return 2 - self.has_embedding - self.has_head

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number that products are made of."""
        return 2 if self.precision == "bf16" else 4

    @property
    def tokens(self) -> int:
        """Tokens of a step over all ranks."""
        return self.batch_size * self.sequence_length

    @functools.cached_property
    def active_experts(self) -> tuple[int, int]:
        """Experts of a token in the steady state, and at the start."""
        return self.model.moe.routed_top_k, active_at_start(self.model)

    @functools.cached_property
    def state_size(self) -> int:
        """Width of the router state that stages hand on; 0 without recurrent routers."""
        router = router_without_values(self.model.moe) if self.model.num_moe_layers else None
        return getattr(router, "state_size", 0)

    @functools.cached_property
    def parts(self) -> Parts:
        """Its parameters."""
        return Parts.of(self.model, has_embedding=self.has_embedding, has_head=self.has_head)

    @functools.cached_property
    def stages(self) -> Callable[[int], Sequence["Stage"]]:
        """(number of stages) → the kinds of them; without a pipeline the job itself."""
        return functools.cache(self._stages)

    @functools.cached_property
    def memory(self) -> Callable[[Workload, int], Memory]:
        """(workload, micro-batches whose activations are kept) → bytes of the layers on one device."""
        return functools.cache(lambda workload, kept: plan(self._repeated(kept), workload).memory)

    def is_one_graph(self, parallel: ParallelConfig) -> bool:
        """Whether a pass is launched as a whole; of an exchange in it the ranks know the rows."""
        return self.is_compiled and parallel.graph != "parts"

    def micro_batch(self, parallel: ParallelConfig) -> int:
        """Sequences that a rank takes at once: the most that divides its share and leaves a micro-batch for each stage.
        ConfigError where there is none.
        """
        own_micro_batch(parallel.data_ranks, self.batch_size, None, parallel.pipeline)
        own = self.batch_size // parallel.data_ranks
        most = min(own // parallel.pipeline, self.micro_batch_size)
        return next(size for size in range(most, 0, -1) if own % size == 0)

    def num_micro_batches(self, parallel: ParallelConfig) -> int:
        """Micro-batches of a rank in a step."""
        return self.batch_size // parallel.data_ranks // self.micro_batch(parallel)

    def workload(self, parallel: ParallelConfig) -> Workload:
        """What a rank computes at once."""
        return Workload(
            sequence_length=self.sequence_length // parallel.sequence_ranks,
            micro_batch_size=self.micro_batch(parallel),
            precision=self.precision,
            activation_checkpointing=self.activation_checkpointing,
        )

    def layout(self, num_gpus: int, sharded: str = "parameters", **sizes: int) -> ParallelConfig | None:
        """The layout with these sizes, 1 where none is given; None where model or batch cannot be shared so."""
        try:
            sizes = dict.fromkeys(SIZES, 1) | sizes
            wanted = replace(self.parallel, data_shard="auto", sharded=sharded, **sizes)
            parallel = resolve_parallel(wanted, num_gpus)
            check_model(parallel, self.model, self.sequence_length)
            self.micro_batch(parallel)
        except ConfigError:
            return None
        return parallel

    def _repeated(self, kept: int) -> ReMoEConfig:
        """A model that keeps for one micro-batch what these layers keep for so many. A stage without the head has one
        of a single token: next to nothing.
        """
        model = self.model
        layers = range(kept * model.num_layers)
        return replace(
            model,
            num_layers=len(layers),
            moe_layers=[layer for layer in layers if model.is_moe_layer(layer % model.num_layers)],
            thresholds=0.0,
            vocab_size=model.vocab_size if self.has_head else 1,
        )

    def _stages(self, count: int) -> Sequence["Stage"]:
        if count == 1:
            return (Stage(self, 0, 1),)
        kinds = [_kind(self.model, layers_of_part(self.model.num_layers, count, index)) for index in range(count)]
        return [Stage(self._of_kind(kind), kinds.index(kind), number) for kind, number in Counter(kinds).items()]

    def _of_kind(self, kind: "_Kind") -> "Job":
        moe_layers = list(range(kind.num_moe_layers))
        model = replace(self.model, num_layers=kind.num_layers, moe_layers=moe_layers, thresholds=0.0)
        return replace(self, model=model, has_embedding=kind.is_first, has_head=kind.is_last)


class Stage(NamedTuple):
    """Stages of one kind: their costs are the same, but for the micro-batches that are under way in them."""

    job: Job
    """The stage's layers as a model."""
    first: int
    """The number of the first such stage, in which most is under way."""
    num_alike: int


class _Kind(NamedTuple):
    """What the costs of a stage depend on."""

    num_layers: int
    num_moe_layers: int
    is_first: bool
    is_last: bool


def _kind(model: ReMoEConfig, layers: range) -> _Kind:
    return _Kind(len(layers), sum(map(model.is_moe_layer, layers)), layers.start == 0, layers.stop == model.num_layers)
