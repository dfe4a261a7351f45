"""ReLU experts with biases and dropout: those of RMoE's character models."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remoe.kernels.grouped_linear import grouped_linear
from remoe.kernels.rows import combine_rows, dispatch_rows
from remoe.moe import initial
from remoe.moe.dispatch import DispatchPlan
from remoe.moe.experts import compute_dtype, own_part


class ReLUExperts(nn.Module):
    """E two-layer MLPs of width F: down(dropout(relu(up x + b))) + c (RMoE §4.1).

    `up_proj` [E, F, H], `up_bias` [E, F], `down_proj` [E, H, F], `down_bias` [E, H]. A plain path: it is for small
    models; the SwiGLU experts have the fast one.
    """

    def __init__(self, num_experts: int, hidden_size: int, expert_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.up_proj = nn.Parameter(torch.empty(num_experts, expert_size, hidden_size))
        self.up_bias = nn.Parameter(torch.empty(num_experts, expert_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))
        self.down_bias = nn.Parameter(torch.empty(num_experts, hidden_size))
        initial.reset(self, 0.0)

    def initial_values(self) -> dict[str, initial.Initial]:
        """As in the base of RMoE's small runs: the fan is taken over the packed tensor, the biases are 0 (§2.10)."""
        weight = initial.Uniform((self.up_proj.shape[1] * self.up_proj.shape[2]) ** -0.5)
        bias = initial.Constant(0.0)
        return {"up_proj": weight, "up_bias": bias, "down_proj": weight, "down_bias": bias}

    def forward(self, hidden_TH: Tensor, plan: DispatchPlan, weights_TE: Tensor) -> Tensor:
        """Run each row through its expert and sum each token's rows, weighted by its gates [T, H].

        Computes in hidden_TH's dtype, or autocast's; gates and sums stay in fp32 or wider.
        """
        dtype = compute_dtype(hidden_TH)
        lists = (plan.token_N, plan.row_N, plan.token_offsets)
        up_proj, up_bias, down_proj, down_bias = (own_part(p).to(dtype) for p in self.parameters())
        rows_NH = dispatch_rows(hidden_TH.to(dtype), *lists)
        act_NF = grouped_linear(rows_NH, up_proj, up_bias, plan.expert_offsets).relu()
        act_NF = F.dropout(act_NF, self.dropout, self.training)
        y_NH = grouped_linear(act_NF, down_proj, down_bias, plan.expert_offsets)
        weights_N1 = weights_TE.flatten().index_select(0, plan.pair_N)[:, None]
        return combine_rows(y_NH * weights_N1, *lists).to(dtype)
