"""The learning rate of each step: a pure function, so that a resumed run needs no scheduler state."""

import math

from remoe.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of `step` (1 is the first) in a run of `steps`: linear warm-up, then the schedule.

    The peak is reached in the last step of the warm-up, `min_lr` in the last step of the run.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * _height(config, min(1.0, progress), steps)


def has_decayed(config: OptimizerConfig, step: int, steps: int, share: float) -> bool:
    """Whether the learning rate of `step`, once warmed up, is below this share of its peak."""
    return step > config.warmup_steps and learning_rate(config, step, steps) < share * config.lr


def _height(config: OptimizerConfig, progress: float, steps: int) -> float:
    """Where the schedule stands between peak (1) and min_lr (0); progress counts from the end of the warm-up."""
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "linear":
        return 1.0 - progress
    if config.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    decay = config.decay_fraction * steps / max(1, steps - config.warmup_steps)
    return min(1.0, (1.0 - progress) / decay) if decay > 0 else 1.0
