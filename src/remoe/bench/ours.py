"""Our layer after the router, as `MoE` runs it: the one place that knows how the op is called."""

from collections.abc import Callable

import torch
from torch import Tensor

from remoe.bench.problem import Problem, Routing
from remoe.moe.dispatch import plan
from remoe.moe.experts import GroupedExperts

Forward = Callable[[], Tensor]
OURS = "remoe"


def candidates(names: list[str]) -> dict[str, Callable[[Problem, Routing], Forward]]:
    """Our back-ends by column name; without names, the one that the layer picks itself."""
    return {OURS: layer}


def layer(problem: Problem, routing: Routing) -> Forward:
    """From gates and routing map to the output; for topk these are made from indices and weights first."""
    shape = problem.shape
    with torch.device("meta"):
        experts = GroupedExperts(shape.num_experts, shape.hidden_size, shape.expert_size)
    experts.gate_up_proj, experts.down_proj = problem.gate_up_proj, problem.down_proj

    def forward() -> Tensor:
        weights_TE, routing_map_TE = routing.dense()
        return experts(problem.hidden_TH, plan(routing_map_TE), weights_TE)

    return forward
