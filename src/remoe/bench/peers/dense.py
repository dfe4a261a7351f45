"""A SwiGLU MLP as wide as a token's active experts together: the same active FLOPs, no routing; the ceiling."""

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.bench.peers import Forward
from remoe.bench.problem import Problem, Routing


def dense(problem: Problem, routing: Routing) -> Forward:
    """Its matrices are fresh leaves: `forward.leaves` of the returned function."""
    shape = problem.shape
    width = shape.expert_size * shape.top_k
    factory = {"dtype": problem.dtype, "device": problem.device}
    gate_up = torch.empty(2 * width, shape.hidden_size, **factory).normal_(0, shape.hidden_size**-0.5).requires_grad_()
    down = torch.empty(shape.hidden_size, width, **factory).normal_(0, width**-0.5).requires_grad_()

    def forward() -> Tensor:
        gate_TF, up_TF = F.linear(problem.hidden_TH, gate_up).chunk(2, -1)
        return F.linear(F.silu(gate_TF) * up_TF, down)

    forward.leaves = (problem.hidden_TH, gate_up, down)  # pyright: ignore[reportFunctionMemberAccess]
    return forward
