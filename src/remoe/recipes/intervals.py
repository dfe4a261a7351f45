"""How sure a difference over seeds is: Student's t without any library."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval; both ends are None where the values give none."""

    mean: float
    low: float | None
    high: float | None


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of a few values with Student's confidence interval. For paired runs: the values are differences.

    A value that is not finite, such as the loss of a run that diverged, leaves no interval.
    """
    mean = statistics.fmean(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return Interval(mean, None, None)
    half = t_quantile(len(values) - 1, confidence) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def t_quantile(degrees: int, confidence: float) -> float:
    """The t above 0 with P(|T| <= t) = confidence, by bisection."""
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < confidence else (low, middle)
    return (low + high) / 2


def t_probability(t: float, degrees: int) -> float:
    """P(|T| <= t) for a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    is_odd = degrees % 2
    term = math.cos(angle) if is_odd else 1.0
    total = 0.0
    for power in range(1 + is_odd, degrees, 2):
        total += term
        term *= math.cos(angle) ** 2 * power / (power + 1)
    if is_odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
