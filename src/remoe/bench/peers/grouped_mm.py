"""What one writes with torch alone: sort the pairs by expert, two grouped matrix products, add rows to tokens."""

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.bench.peers import Forward, NotApplicable
from remoe.bench.problem import Problem, Routing


def eager(problem: Problem, routing: Routing) -> Forward:
    """Each operation by itself."""

    def forward() -> Tensor:
        return _layer(problem.hidden_TH, problem.gate_up_proj, problem.down_proj, *routing.lists())

    return forward


def compiled(problem: Problem, routing: Routing) -> Forward:
    """The layer through torch.compile for this very number of pairs; the lists before it are made eagerly."""
    if problem.dtype != torch.bfloat16:
        raise NotApplicable("torch compiles grouped_mm in bf16 only")
    torch._dynamo.reset()
    layer = torch.compile(_layer, dynamic=False)

    def forward() -> Tensor:
        return layer(problem.hidden_TH, problem.gate_up_proj, problem.down_proj, *routing.lists())

    return forward


def _layer(
    hidden_TH: Tensor, gate_up_proj: Tensor, down_proj: Tensor, token_N: Tensor, expert_N: Tensor, weight_N: Tensor
) -> Tensor:
    order_N = torch.argsort(expert_N, stable=True)
    token_N = token_N.index_select(0, order_N)
    ends = expert_ends(expert_N, gate_up_proj.shape[0])
    x_NH = hidden_TH.index_select(0, token_N)
    gate_NF, up_NF = F.grouped_mm(x_NH, gate_up_proj.transpose(1, 2), offs=ends).chunk(2, -1)
    y_NH = F.grouped_mm(F.silu(gate_NF) * up_NF, down_proj.transpose(1, 2), offs=ends)
    rows_NH = y_NH.float() * weight_N.index_select(0, order_N)[:, None]
    out_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32, device=hidden_TH.device)
    return out_TH.index_add(0, token_N, rows_NH).to(hidden_TH.dtype)


def expert_ends(expert_N: Tensor, num_experts: int) -> Tensor:
    """Where each expert's rows end among the sorted ones, int32 [E]; experts past the last are not counted."""
    values_N = expert_N.int() if expert_N.is_cuda else expert_N.float()  # histc knows integers on GPUs only
    counts_E = torch.histc(values_N, bins=num_experts, min=0, max=num_experts - 1)
    return counts_E.cumsum(0).to(torch.int32)
