"""Liger's fused MoE (linkedin/Liger-Kernel): Triton, fixed k only."""

from importlib import import_module
from typing import Any

from torch import Tensor

from remoe.bench.peers import Forward, NotApplicable
from remoe.bench.problem import Problem, Routing


def liger(problem: Problem, routing: Routing) -> Forward:
    """k experts a token; it has no path for variable counts."""
    function: Any = import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    if routing.index_TK is None:
        raise NotApplicable("fixed k only")
    index_TK = routing.index_TK

    def forward() -> Tensor:
        weights = problem.gate_up_proj, problem.down_proj
        return function.apply(problem.hidden_TH, *weights, index_TK.int(), routing.weights)

    return forward
