"""What a run's metrics say, in a few numbers: how far it came, its late averages, its speed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from remoe.training.metrics import Metrics, last_value, late_values

if TYPE_CHECKING:
    from remoe.training import Run


def is_finished(run: "Run", step: int) -> bool:
    """Whether a run that has logged `step` is at its last one and has saved it."""
    last = run.config.train.steps
    return step >= last and (run.checkpoints / f"step_{last:08d}").is_dir()


def late_mean(rows: Sequence[Metrics], key: str) -> float | None:
    """Mean of a metric over the last quarter of the steps; None where it was not measured (a dense model)."""
    values = late_values(rows, key)
    return statistics.fmean(values) if values else None


def median_speed(rows: Sequence[Metrics]) -> float | None:
    """Median tokens per second over the last quarter of the steps."""
    speeds = late_values(rows, "tokens_per_second")
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


def outcome(run: "Run") -> dict[str, Any]:
    """A run's result in plain numbers."""
    rows = run.metrics()
    return {
        "step": last_value(rows, "step", 0),
        "tokens": last_value(rows, "tokens", 0),
        "valid_loss": last_value(rows, "valid_loss", math.nan),
        "sparsity": late_mean(rows, "sparsity"),
        "active_experts": late_mean(rows, "active_experts"),
        "tokens_per_second": median_speed(rows),
    }
