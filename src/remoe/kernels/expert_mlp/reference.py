"""The meaning of remoe::expert_mlp, straight from the paper; every kernel must match it, gradients included."""

import torch
from torch import Tensor
from torch.nn import functional as F


def expert_mlp(
    hidden_TH: Tensor, weights_TE: Tensor, routing_map_TE: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """Y[t] = sum over active e of R[t, e] * FFN_e(X[t]) (ReMoE eq. 3), every expert computed for every token."""
    out_TH = torch.zeros_like(hidden_TH, dtype=torch.promote_types(hidden_TH.dtype, weights_TE.dtype))
    for expert, (gate_up, down) in enumerate(zip(gate_up_proj, down_proj, strict=True)):
        gate_TF, up_TF = F.linear(hidden_TH, gate_up).chunk(2, dim=-1)
        y_TH = F.linear(F.silu(gate_TF) * up_TF, down)
        weight_T = weights_TE[:, expert] * routing_map_TE[:, expert]
        out_TH = out_TH + weight_T[:, None] * y_TH
    return out_TH.to(hidden_TH.dtype)
