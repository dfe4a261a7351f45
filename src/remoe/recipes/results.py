"""What a run's metrics say, in a few numbers: how far it came, its late averages, its speed."""

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from remoe.training.metrics import late_values

if TYPE_CHECKING:
    from remoe.training import Run


def is_finished(run: "Run") -> bool:
    """Whether the run has logged its last step and saved it."""
    last = run.config.train.steps
    return run.step >= last and (run.checkpoints / f"step_{last:08d}").is_dir()


def late_mean(run: "Run", key: str) -> float | None:
    """Mean of a metric over the last quarter of the steps; None where it was not measured (a dense model)."""
    values = late_values(run.metrics(), key)
    return statistics.fmean(values) if values else None


def median_speed(run: "Run") -> float | None:
    """Median tokens per second over the last quarter of the steps."""
    speeds = late_values(run.metrics(), "tokens_per_second")
    return statistics.median(speeds) if speeds else None


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values; None stands for a missing one."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found[f"{prefix}{key}"] = old, new
    return found


def outcome(run: "Run") -> dict[str, float | None]:
    """A run's result in plain numbers."""
    return {
        "step": run.step,
        "tokens": run.tokens,
        "valid_loss": run.valid_loss,
        "sparsity": late_mean(run, "sparsity"),
        "active_experts": late_mean(run, "active_experts"),
        "tokens_per_second": median_speed(run),
    }
