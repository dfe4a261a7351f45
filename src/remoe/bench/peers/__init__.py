"""Other implementations of the layer, by name. A new one is one file and one line here.

Each builds, for a problem and a routing, a function of no arguments that runs the layer forward from the problem's own
tensors; making index lists is part of it. It raises `NotApplicable` for a routing that it has no path for.
"""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import cast

from torch import Tensor

from remoe.bench.problem import Problem, Routing

Forward = Callable[[], Tensor]
Builder = Callable[[Problem, Routing], Forward]

PEERS = {
    "dense": "remoe.bench.peers.dense:dense",
    "grouped_mm": "remoe.bench.peers.grouped_mm:eager",
    "grouped_mm_compiled": "remoe.bench.peers.grouped_mm:compiled",
    "loop": "remoe.bench.peers.loop:loop",
    "transformers": "remoe.bench.peers.transformers_experts:eager_loop",
    "transformers_grouped_mm": "remoe.bench.peers.transformers_experts:grouped_mm",
    "transformers_grouped_mm_compiled": "remoe.bench.peers.transformers_experts:grouped_mm_compiled",
    "scattermoe": "remoe.bench.peers.scattermoe:scattermoe",
    "sonicmoe": "remoe.bench.peers.sonicmoe:sonicmoe",
    "liger": "remoe.bench.peers.liger:liger",
}
LIBRARIES = {name: "transformers" for name in PEERS if name.startswith("transformers")} | {
    "scattermoe": "scattermoe",
    "sonicmoe": "sonicmoe",
    "liger": "liger_kernel",
}
CEILING = "dense"
"""Not a MoE layer: the same active FLOPs without routing."""


class NotApplicable(Exception):  # noqa: N818 - not an error: a peer that has no path for a routing
    """Why a peer cannot take part."""


def missing(name: str) -> str | None:
    """Why the peer cannot run here at all: the library that is not installed; None where it can."""
    library = LIBRARIES.get(name)
    return None if library is None or find_spec(library) is not None else f"{library} is not installed"


def build(name: str, problem: Problem, routing: Routing) -> Forward:
    """The peer's layer; NotApplicable where it has no path for the routing."""
    module, _, attribute = PEERS[name].partition(":")
    return cast(Builder, getattr(importlib.import_module(module), attribute))(problem, routing)
