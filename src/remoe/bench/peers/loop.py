"""Two plain matrix products an expert on counts that the host knows: Megatron's SequentialMLP."""

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.bench.peers import Forward
from remoe.bench.peers.grouped_mm import expert_ends
from remoe.bench.problem import Problem, Routing


def loop(problem: Problem, routing: Routing) -> Forward:
    """The sizes of the groups wait for the device."""

    def forward() -> Tensor:
        hidden_TH = problem.hidden_TH
        token_N, expert_N, weight_N = routing.lists()
        order_N = torch.argsort(expert_N, stable=True)
        token_N = token_N.index_select(0, order_N)
        counts = expert_ends(expert_N, routing.num_experts).diff(prepend=expert_N.new_zeros(1, dtype=torch.int32))
        groups = hidden_TH.index_select(0, token_N).split(counts.tolist())
        matrices = zip(groups, problem.gate_up_proj.unbind(), problem.down_proj.unbind(), strict=True)
        y_NH = torch.cat([_mlp(*expert) for expert in matrices])
        rows_NH = y_NH.float() * weight_N.index_select(0, order_N)[:, None]
        out_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32, device=hidden_TH.device)
        return out_TH.index_add(0, token_N, rows_NH).to(hidden_TH.dtype)

    return forward


def _mlp(rows_nH: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate_nF, up_nF = F.linear(rows_nH, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate_nF) * up_nF, down)
