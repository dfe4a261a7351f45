"""Settings of one run: every section of a run's config.yaml, with the defaults of the papers."""

import re
from pathlib import Path

from remoe.config import check_choice, check_positive, check_range, config_class, setting
from remoe.data.config import DataConfig
from remoe.distributed.config import ParallelConfig
from remoe.errors import ConfigError
from remoe.model.config import ReMoEConfig
from remoe.model.recompute import recomputation
from remoe.moe.update_rule import UpdateRule
from remoe.training import frozen


@config_class
class OptimizerConfig:
    """AdamW and its schedule (ReMoE §3: peak 5e-4, cosine to a tenth, 1 % warm-up; here for small models)."""

    lr: float = setting(1.0e-3, "peak learning rate")
    min_lr: float = setting(1.0e-4, "learning rate at the last step")
    warmup_steps: int = setting(20, "steps of linear warm-up")
    schedule: str = setting("cosine", "cosine, linear, wsd (flat, then a linear last part) or constant")
    decay_fraction: float = setting(0.2, "share of the steps in which wsd decays")
    beta1: float = setting(0.9, "AdamW's first decay rate")
    beta2: float = setting(0.999, "AdamW's second decay rate")
    eps: float = setting(1e-8, "AdamW's epsilon")
    weight_decay: float = setting(0.01, "decay of matrices; norms and biases have none")
    clip: float = setting(1.0, "largest gradient norm; 0 turns clipping off")

    def __post_init__(self) -> None:
        check_choice("optimizer.schedule", self.schedule, ("cosine", "linear", "wsd", "constant"))
        check_range("optimizer.lr", self.lr, 0.0)
        check_range("optimizer.min_lr", self.min_lr, 0.0, self.lr, fix="lower it or raise optimizer.lr")
        check_range("optimizer.warmup_steps", self.warmup_steps, 0)
        check_range("optimizer.clip", self.clip, 0.0)
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"optimizer.{key} is {getattr(self, key)}, must be at least 0 and below 1")
        check_positive("optimizer.eps", self.eps, fix="try 1e-8")
        check_range("optimizer.weight_decay", self.weight_decay, 0.0)
        check_range("optimizer.decay_fraction", self.decay_fraction, 0.0, 1.0)


@config_class
class LossConfig:
    """Coefficients of the auxiliary terms that are not adapted; routers that do not use a term ignore it."""

    load_balancing_coef: float = setting(0.01, "times the Switch load-balancing loss, summed over layers")
    router_z_coef: float = setting(0.0, "times the router z-loss, summed over layers")

    def __post_init__(self) -> None:
        check_range("losses.load_balancing_coef", self.load_balancing_coef, 0.0)
        check_range("losses.router_z_coef", self.router_z_coef, 0.0)


@config_class
class SparsityConfig(UpdateRule):
    """The adaptive L1 coefficient of ReLU routing (ReMoE eq. 7, 10), and help for layers that it starves."""

    init: float = setting(1.0e-8, "coefficient of the first step")
    multiplier: float = setting(1.2, "factor of one update")
    min_coef: float = setting(1e-16, "smallest coefficient")
    max_coef: float = setting(1e4, "largest coefficient")
    load_balanced: bool = setting(True, "weigh each expert by its load (eq. 10); false: plain L1 (eq. 9)")
    per_layer: bool = setting(False, "one coefficient a layer (an experiment)")
    mode: str = setting("paper", "paper, or released: sum over layers, loads of the micro-batch, a tie lowers")
    loads: str = setting("data_ranks", "whose loads weigh the term: data_ranks, micro_batch or previous_step")
    hold_below_lr: float = setting(0.0, "hold the coefficient once the lr is below this share of its peak; 0: never")
    density_floor: float = setting(0.0, "spare a layer whose density is below this share of the target; 0: none")
    revival_coef: float = setting(0.0, "times the pull at the nearest gates of starving layers and idle experts")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("sparsity.mode", self.mode, ("paper", "released"))
        check_choice("sparsity.loads", self.loads, ("data_ranks", "micro_batch", "previous_step"))
        if not 1 < self.multiplier < float("inf"):
            raise ConfigError(
                f"sparsity.multiplier is {self.multiplier}, must be above 1: the coefficient could not grow; try 1.2"
            )
        if not 0 < self.min_coef <= self.init <= self.max_coef:
            raise ConfigError(
                f"sparsity.init is {self.init}, must be between sparsity.min_coef = {self.min_coef} (above 0) "
                f"and sparsity.max_coef = {self.max_coef}"
            )
        check_range("sparsity.hold_below_lr", self.hold_below_lr, 0.0, 1.0)
        check_range("sparsity.density_floor", self.density_floor, 0.0, 1.0)
        check_range("sparsity.revival_coef", self.revival_coef, 0.0)
        if self.mode == "released" and self.is_smoother:
            raise ConfigError(
                "sparsity.mode is 'released', whose rule is the sign rule; use mode paper, or leave sparsity.rule, "
                "dead_band and average at their defaults"
            )


@config_class
class LoopConfig:
    """How long a run goes on, on what, and when it measures and saves."""

    steps: int = setting(300, "optimizer steps")
    batch_size: int = setting(16, "sequences a step, over all ranks")
    micro_batch_size: int | None = setting(None, "sequences a forward pass on one rank; null: its share of batch_size")
    precision: str = setting("fp32", "fp32, or bf16: products in bf16, weights, their gradients and all else in fp32")
    device: str = setting("auto", "auto, cpu, cuda, or cuda:N")
    compile: bool = setting(
        False, "torch.compile model and losses as one graph; in several processes attention, routers and dense MLPs"
    )
    cuda_graphs: bool = setting(False, "run each micro-batch as one CUDA graph; needs a GPU and rows auto or capacity")
    deterministic: bool = setting(
        False, "the same bits each run on the same devices, threads and layout, or an error; slower on a GPU"
    )
    activation_checkpointing: bool | str = setting(
        "none", "computed again in the backward pass: none, full (layers), selective (all but experts); less memory"
    )
    rows: str = setting(
        "auto", "rows of a layer: exact (waits for their number), capacity (by earlier steps); auto: capacity on a GPU"
    )
    log_interval: int = setting(1, "steps between lines of metrics.jsonl")
    validation_interval: int = setting(100, "steps between validations (also after the last step)")
    validation_batches: int = setting(20, "batches of one validation")
    checkpoint_interval: int = setting(100, "steps between checkpoints (also after the last step)")
    async_checkpoint: bool = setting(
        True, "write checkpoints while training goes on, from a copy in host memory; false: training waits, no copy"
    )
    keep_checkpoints: int = setting(2, "how many of the newest checkpoints stay, besides the best")
    flip_interval: int = setting(10, "steps between measurements of the routing's flip rate; 0: never")
    max_bad_steps: int = setting(10, "steps in a row without a finite loss after which the run stops")
    sinks: list[str] = setting(list, "more places for metrics: tensorboard, wandb, trackio")
    init_from: Path | None = setting(
        None, "a run, checkpoint or export to start from: weights, model and tokenizer; null: drawn from the seed"
    )
    freeze_router: str = setting(
        "none", "router weights that stay as they start: none, head (the logits' own), head_and_cell, all"
    )

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "log_interval", "validation_interval", "validation_batches"):
            check_range(f"train.{key}", getattr(self, key), 1)
        for key in ("checkpoint_interval", "keep_checkpoints", "max_bad_steps"):
            check_range(f"train.{key}", getattr(self, key), 1)
        check_range("train.flip_interval", self.flip_interval, 0)
        check_choice("train.precision", self.precision, ("fp32", "bf16"))
        recomputation("train.activation_checkpointing", self.activation_checkpointing)
        check_choice("train.freeze_router", self.freeze_router, frozen.MODES)
        check_choice("train.rows", self.rows, ("auto", "exact", "capacity"))
        if self.cuda_graphs and self.rows == "exact":
            raise ConfigError(
                "train.cuda_graphs is true, needs train.rows auto or capacity; it is 'exact', which waits"
            )
        for sink in self.sinks:
            check_choice("train.sinks", sink, ("tensorboard", "wandb", "trackio"))
        if self.micro_batch_size is not None:
            check_range("train.micro_batch_size", self.micro_batch_size, 1)
        if self.batch_size % self.micro_batch:
            raise ConfigError(
                f"train.micro_batch_size is {self.micro_batch_size}, must divide train.batch_size = {self.batch_size}"
            )

    @property
    def micro_batch(self) -> int:
        """Sequences of one forward pass."""
        return self.micro_batch_size or self.batch_size


@config_class
class TrainConfig:
    """One run. Every key has a default; `remoe train --keys` lists them."""

    name: str = setting("run", "the run's folder below runs/")
    seed: int = setting(0, "seed of initial weights and sample order")
    model: ReMoEConfig = setting(ReMoEConfig, "the model")
    data: DataConfig = setting(DataConfig, "the text")
    optimizer: OptimizerConfig = setting(OptimizerConfig, "the optimizer")
    losses: LossConfig = setting(LossConfig, "auxiliary losses with a fixed coefficient")
    sparsity: SparsityConfig = setting(SparsityConfig, "the adaptive L1 term of ReLU routing")
    train: LoopConfig = setting(LoopConfig, "the loop")
    parallel: ParallelConfig = setting(ParallelConfig, "how the processes that torchrun started share the work")

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0, 2**63 - 1)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*", self.name):
            raise ConfigError(f"name is {self.name!r}, must be letters, digits, '.', '_' and '-' (parts joined by '/')")
