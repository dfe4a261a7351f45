"""Routers that can be evaluated in more than one way, such as Expert Choice with and without a view of the future."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn


def other_evaluations(model: nn.Module) -> tuple[str, ...]:
    """The ways in which the model's routers can be evaluated besides the one in force; mostly none."""
    routers = _routers(model)
    return () if not routers else tuple(way for way in routers[0].evaluations if way != routers[0].evaluation)


@contextmanager
def evaluated_as(model: nn.Module, way: str | None) -> Generator[None]:
    """Let the model's routers be evaluated in another way inside; None: as they are."""
    before = [(router, router.evaluation) for router in _routers(model)]
    for router, own in before:
        router.evaluation = own if way is None else way
    try:
        yield
    finally:
        for router, own in before:
            router.evaluation = own


def _routers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "evaluations")]
