"""ScatterMoE (shawntan/scattermoe): Triton products that gather and scatter rows; fixed k, else padded."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.bench.peers import Forward
from remoe.bench.peers.grouped_mm import expert_ends
from remoe.bench.problem import Problem, Routing


def scattermoe(problem: Problem, routing: Routing) -> Forward:
    """Expert E in the gaps of padded lists sorts last and belongs to no expert's rows."""
    library: Any = import_module("scattermoe.parallel_experts")
    gate_up, down = problem.gate_up_proj.transpose(1, 2), problem.down_proj.transpose(1, 2)

    def forward() -> Tensor:
        index_TK, weights_TK = routing.padded()
        if routing.index_TK is None:
            expert_N, order_N = torch.sort(index_TK.reshape(-1))
            ends = expert_ends(index_TK.reshape(-1), routing.num_experts).long()
        else:
            expert_N, order_N, ends = library.flatten_sort_count(index_TK, num_experts=routing.num_experts)
        lists = (expert_N, order_N, ends)
        up_N2F = library.parallel_linear(problem.hidden_TH, gate_up, index_TK.shape[1], *lists, grouped_out=True)
        gate_NF, up_NF = up_N2F.chunk(2, dim=-1)
        weights_TK = weights_TK.to(problem.dtype)
        return library.parallel_linear(F.silu(gate_NF) * up_NF, down, 1, *lists, grouped_in=True, gates=weights_TK)

    return forward
