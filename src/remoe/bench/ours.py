"""Our layer after the router, as `MoE` runs it: the one place that knows how the op is called."""

from collections.abc import Callable

import torch
from torch import Tensor

from remoe.bench.problem import Problem, Routing
from remoe.moe.dispatch import plan
from remoe.moe.experts import GroupedExperts

Forward = Callable[[], Tensor]
Builder = Callable[[Problem, Routing], Forward]

CAPACITY_MARGIN = 1.25


def exact(problem: Problem, routing: Routing) -> Forward:
    """As many rows as there are pairs: on a GPU each call waits for that number."""
    return _layer(problem, routing, None)


def capacity(problem: Problem, routing: Routing) -> Forward:
    """Rows for CAPACITY_MARGIN times the pairs, as in a training step that never waits."""
    return _layer(problem, routing, int(problem.shape.num_pairs * CAPACITY_MARGIN))


COLUMNS: dict[str, Builder] = {"remoe": exact, "remoe_capacity": capacity}


def default_columns(device: torch.device) -> list[str]:
    """All that differ on the device: a CPU never waits."""
    return list(COLUMNS) if device.type == "cuda" else ["remoe"]


def _layer(problem: Problem, routing: Routing, rows: int | None) -> Forward:
    """From gates and routing map to the output; for topk these are made from indices and weights first."""
    shape = problem.shape
    with torch.device("meta"):
        experts = GroupedExperts(shape.num_experts, shape.hidden_size, shape.expert_size)
    experts.gate_up_proj, experts.down_proj = problem.gate_up_proj, problem.down_proj

    def forward() -> Tensor:
        weights_TE, routing_map_TE = routing.dense()
        return experts(problem.hidden_TH, plan(routing_map_TE, rows), weights_TE)

    return forward
