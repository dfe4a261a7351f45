"""The lines of a run's metrics.jsonl as columns of numbers."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from remoe.training.metrics import late_values

KEPT_FIRST, KEPT_LATER = 2000, 2000


@dataclass(frozen=True)
class Metrics:
    """Logged steps in order, one mapping each. The first ones are complete, later ones may be thinned."""

    rows: tuple[Mapping[str, Any], ...]

    def series(self, *keys: str) -> tuple[np.ndarray, ...]:
        """One array a key, over the steps at which all of them were logged as finite numbers."""
        rows = [row for row in self.rows if all(_is_number(row.get(key)) for key in keys)]
        return tuple(np.array([row[key] for row in rows], dtype=float) for key in keys)

    def layers(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps [N] and the values of each MoE layer [N, L]; L is 0 where the run did not log the key."""
        rows = [row for row in self.rows if (row.get("layers") or {}).get(key)]
        values = [[np.nan if value is None else value for value in row["layers"][key]] for row in rows]
        steps = np.array([row["step"] for row in rows], dtype=float)
        return steps, np.array(values, dtype=float) if values else np.empty((0, 0))

    def last(self, key: str) -> Any:
        """The newest logged value of a key, None if there is none."""
        return next((row[key] for row in reversed(self.rows) if row.get(key) is not None), None)

    def late_mean(self, key: str) -> float | None:
        """Mean over the last quarter of the steps, None if the key was not logged there."""
        values = late_values(self.rows, key)
        return statistics.fmean(values) if values else None

    def late_median(self, key: str) -> float | None:
        """The same with the median: what a pause or a slow step does not move."""
        values = late_values(self.rows, key)
        return statistics.median(values) if values else None


def smooth(values: np.ndarray, window: int | None = None) -> np.ndarray:
    """The mean of each value and up to `window - 1` before it; by default over one fiftieth of the run."""
    window = window or max(1, len(values) // 50)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def thinned(rows: Sequence[Mapping[str, Any]]) -> Metrics:
    """All of the first rows, every n-th later one, and every row with a validation."""
    later = rows[KEPT_FIRST:]
    every = max(1, -(-len(later) // KEPT_LATER))
    kept = [
        row
        for index, row in enumerate(later)
        if (len(later) - 1 - index) % every == 0 or row.get("valid_loss") is not None
    ]
    return Metrics((*rows[:KEPT_FIRST], *kept))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
