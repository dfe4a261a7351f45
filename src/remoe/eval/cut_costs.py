"""Which layers to thin out for fewer experts: what each layer alone costs when it is cut, and the cheapest mix."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple


class Cut(NamedTuple):
    """One layer thinned out, all others as they were trained."""

    removed: float
    """Experts a token that it uses less."""
    cost: float
    """By how much the loss rises, in nats."""


class _Step(NamedTuple):
    price: float
    """Nats for each expert a token."""
    layer: int
    removed: float


def cheapest_density(
    trained_L: Sequence[float], cuts_L: Sequence[Sequence[Cut]], mean: float, most: int
) -> list[float]:
    """Experts a token for each layer, `mean` on average: the mix with the lowest cost if costs add up.

    `trained_L`: what each layer uses as trained; `cuts_L`: measured cuts of each, the last one down to 0. A mean above
    the trained one opens the same share of the closed experts in each layer, of `most` that it has: there is no cost
    to tell layers apart by.
    """
    missing = sum(trained_L) - mean * len(trained_L)
    if missing <= 0:
        closed = sum(most - active for active in trained_L)
        share = -missing / closed if closed else 0.0
        return [active + share * (most - active) for active in trained_L]
    active_L = list(trained_L)
    for step in sorted(step for layer, cuts in enumerate(cuts_L) for step in _steps(layer, cuts)):
        removed = min(step.removed, missing)
        active_L[step.layer] -= removed
        missing -= removed
    return [max(0.0, active) for active in active_L]


def _steps(layer: int, cuts: Sequence[Cut]) -> list[_Step]:
    """The lower convex hull of a layer's costs, from no cut on: its prices rise, so the steps are taken in order."""
    hull = [Cut(0.0, 0.0)]
    for cut in sorted(cuts):
        while len(hull) > 1 and _price(hull[-2], cut) <= _price(hull[-2], hull[-1]):
            hull.pop()
        if cut.removed > hull[-1].removed:
            hull.append(cut)
    return [_Step(_price(a, b), layer, b.removed - a.removed) for a, b in itertools.pairwise(hull)]


def _price(before: Cut, after: Cut) -> float:
    return (after.cost - before.cost) / (after.removed - before.removed)
