"""SwiGLU experts over the rows of a DispatchPlan."""

import torch
from torch import Tensor, nn

from remoe.kernels.expert_mlp import expert_mlp
from remoe.kernels.expert_mlp.sums import Sums
from remoe.moe import initial
from remoe.moe.dispatch import DispatchPlan
from remoe.moe.routing import Merging

_ROWS_OF_NO_CONCERN = 16384  # below that chunks would cost more time than they save memory


class GroupedExperts(nn.Module):
    """E SwiGLU MLPs of width F: down(silu(gate x) * (up x)), no biases.

    `gate_up_proj` [E, 2F, H] holds the gate rows first, `down_proj` is [E, H, F].
    """

    def __init__(self, num_experts: int, hidden_size: int, expert_size: int, init_std: float = 0.01) -> None:
        super().__init__()
        self.kernels = "auto"
        """The back-end of remoe::expert_mlp."""
        self.kept_rows_per_token = 0.0
        """Most rows that a call keeps for its backward pass, a token; with more it works in chunks. 0: any number."""
        self.keeps_all_rows = False
        """Keep any number after all: for a model whose layers together keep few enough."""
        self.gradient_sums: Sums | None = None
        """What a backward pass adds to in place of the parameters' `grad`."""
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))
        initial.reset(self, init_std)

    def forward(self, hidden_TH: Tensor, plan: DispatchPlan, weights_TE: Tensor) -> Tensor:
        """Run each row through its expert and sum each token's rows, weighted by its gates [T, H].

        Computes in hidden_TH's dtype, or autocast's; gates and sums stay in fp32 or wider.
        """
        dtype = compute_dtype(hidden_TH)
        gate_up_proj, down_proj = (own_part(matrices).to(dtype) for matrices in (self.gate_up_proj, self.down_proj))
        row_cap = 0 if self.keeps_all_rows else self.row_cap(hidden_TH.shape[0])
        sums = self.gradient_sums or (None, None)
        out_TH, _ = expert_mlp(
            hidden_TH.to(dtype), weights_TE, gate_up_proj, down_proj, *plan.lists, row_cap, self.kernels, *sums
        )
        return out_TH

    def row_cap(self, num_tokens: int) -> int:
        """Rows that a call of so many tokens keeps at most; with more it works in chunks. 0: any number."""
        return row_cap(self.kept_rows_per_token, num_tokens) if self.kept_rows_per_token else 0


class MergedExperts(GroupedExperts):
    """The same parameters, but each run of tokens goes through one expert: the weighted sum of all (Lory)."""

    def forward(self, hidden_TH: Tensor, plan: Merging, weights_TE: Tensor) -> Tensor:  # pyright: ignore
        """Merge each matrix by itself for every run and run its tokens through the result [T, H]."""
        dtype = compute_dtype(hidden_TH)
        weights_JE = plan.weights_JE.to(dtype)
        gate_up_J2FH, down_JHF = (
            (weights_JE @ matrices.to(dtype).flatten(1)).view(len(weights_JE), *matrices.shape[1:])
            for matrices in (self.gate_up_proj, self.down_proj)
        )
        index_T = torch.arange(len(hidden_TH) + 1, device=hidden_TH.device)
        run_offsets = torch.cat((plan.first_J, index_T[-1:]))
        one_expert = (index_T[:-1], index_T[:-1], index_T[:-1], run_offsets, index_T)
        gates_T1 = plan.counted_T[:, None].to(weights_TE.dtype)
        out_TH, _ = expert_mlp(hidden_TH.to(dtype), gates_T1, gate_up_J2FH, down_JHF, *one_expert)
        return out_TH


def row_cap(kept_rows_per_token: float, num_tokens: int) -> int:
    """Rows that a call keeps for its backward pass at most, so many a token but never few."""
    return max(_ROWS_OF_NO_CONCERN, int(kept_rows_per_token * num_tokens))


def compute_dtype(hidden_TH: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's where it is on, else the tensor's."""
    device = hidden_TH.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TH.dtype


def in_compute_dtype(hidden: Tensor) -> Tensor:
    """Cast once where autocast is on: it would make and keep one copy for each projection that reads the tensor."""
    return hidden.to(compute_dtype(hidden))


def own_part(parameter: Tensor) -> Tensor:
    """This rank's experts, where ranks share them (a DTensor); else the parameter itself."""
    to_local = getattr(parameter, "to_local", None)
    return parameter if to_local is None else to_local()
