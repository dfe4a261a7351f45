"""What is to be trained, as far as its cost depends on it."""

from dataclasses import dataclass, field, replace

from remoe.distributed.config import ParallelConfig, check_experts, check_sequence, own_micro_batch, resolve_parallel
from remoe.errors import ConfigError
from remoe.model.config import ReMoEConfig
from remoe.model.size import Workload, active_at_start, parameter_count
from remoe.moe.routers import router_class


@dataclass(frozen=True, kw_only=True)
class Job:
    """One optimizer step of a model with a vocabulary; `micro_batch_size` is the most that a rank takes at once."""

    model: ReMoEConfig
    batch_size: int
    micro_batch_size: int
    sequence_length: int
    precision: str = "bf16"
    activation_checkpointing: str = "none"
    is_compiled: bool = False
    """Steps are launched as a whole (train.compile, train.cuda_graphs): the host does not hold the device up."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Sizes that are planned are replaced; `reshard` and `reduce` hold for all layouts."""

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number that products are made of."""
        return 2 if self.precision == "bf16" else 4

    @property
    def tokens(self) -> int:
        """Tokens of a step over all ranks."""
        return self.batch_size * self.sequence_length

    def active_experts(self) -> tuple[int, int]:
        """Experts of a token in the steady state, and at the start."""
        return self.model.moe.routed_top_k, active_at_start(self.model)

    def micro_batch(self, parallel: ParallelConfig) -> int:
        """Sequences that a rank takes at once: the most that divides its share. ConfigError where it has no share."""
        own_micro_batch(parallel.data_ranks, self.batch_size, None)
        own = self.batch_size // parallel.data_ranks
        return next(size for size in range(min(own, self.micro_batch_size), 0, -1) if own % size == 0)

    def workload(self, parallel: ParallelConfig) -> Workload:
        """What a rank computes at once."""
        return Workload(
            sequence_length=self.sequence_length // parallel.sequence_ranks,
            micro_batch_size=self.micro_batch(parallel),
            precision=self.precision,
            activation_checkpointing=self.activation_checkpointing,
        )

    def layout(self, num_gpus: int, **sizes: int) -> ParallelConfig | None:
        """The layout with these sizes and no pipeline; None where the model or its batch cannot be shared so."""
        moe = self.model.moe
        has_experts = self.model.num_moe_layers > 0
        kind = getattr(router_class(moe.router_name), "experts", "grouped")
        try:
            parallel = resolve_parallel(replace(self.parallel, data_shard="auto", pipeline=1, **sizes), num_gpus)
            check_experts(parallel, moe.routed_experts if has_experts else 0, kind)
            check_sequence(parallel, self.model, self.sequence_length)
            self.micro_batch(parallel)
        except ConfigError:
            return None
        return parallel


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Parameters by who gathers them: those of one layer's experts, attention and dense MLP, and all others."""

    experts: int
    attention: int
    dense: int
    root: int
    total: int

    @classmethod
    def of(cls, model: ReMoEConfig) -> "Parts":
        """Count a model's."""
        total, layers, moe_layers = parameter_count(model).total, model.num_layers, model.num_moe_layers
        attention = 2 * model.hidden_size * model.head_width * (model.num_heads + model.kv_heads)
        dense = 3 * model.hidden_size * model.intermediate_size
        experts = dense * model.num_experts
        root = total - layers * attention - moe_layers * experts - (layers - moe_layers) * dense
        return cls(experts=experts, attention=attention, dense=dense, root=root, total=total)
