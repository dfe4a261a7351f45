"""What quack_products.py promises, one matrix product an expert: for tests of what calls it, on any machine."""

from itertools import pairwise

import torch
from torch.nn import functional as F


def swiglu(tiles, x, token_N, gate_up_proj, starts, up_N2F, act_NF):
    for expert, rows, x_NH in of_experts(x, token_N, starts):
        gate_NF, up_NF = (x_NH @ gate_up_proj[expert].float().T).chunk(2, -1)
        up_N2F[rows] = torch.stack((gate_NF, up_NF), -1).flatten(1).to(up_N2F.dtype)
        act_NF[rows] = (F.silu(gate_NF) * up_NF).to(act_NF.dtype)


def rows_matmul(tiles, x, token_N, weight_ENK, starts, out):
    for expert, rows, x_NK in of_experts(x, token_N, starts):
        out[rows] = (x_NK @ weight_ENK[expert].float().T).to(out.dtype)


def weight_grad(tiles, starts, left, token_N, right, out, *, add):
    for expert, rows, left_NM in of_experts(left, token_N, starts):
        product = left_NM.T @ right[rows].float()
        out[expert] = (out[expert] + product if add else product).to(out.dtype)


def of_experts(x, token_N, starts):
    """Each expert, its rows, and what x has for them in fp32."""
    assert starts.dtype == torch.int32
    assert token_N is None or token_N.dtype == torch.int32
    ends = starts.tolist()
    for expert, (first, last) in enumerate(pairwise(ends)):
        rows = slice(first, last)
        yield expert, rows, (x[rows] if token_N is None else x[token_N[rows].long()]).float()
