"""SonicMoE (Dao-AILab/sonic-moe): CuTe products with fused gather, SwiGLU and their gradients; Hopper and newer."""

import os
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from remoe.bench.peers import Forward
from remoe.bench.problem import Problem, Routing

TUNED = "REMOE_BENCH_SONICMOE_TUNED"
"""Set to 1, SonicMoE tunes itself: minutes a shape, and seconds again at each new number of pairs."""


def sonicmoe(problem: Problem, routing: Routing) -> Forward:
    """Its path for k experts a token without its router, and its general one for lists of any length."""
    library: Any = import_module("sonicmoe")
    if os.environ.get(TUNED) != "1":
        _keep_default_configuration()
    weights = problem.gate_up_proj.permute(1, 2, 0), problem.down_proj.permute(1, 2, 0)
    if routing.index_TK is not None:
        return _fixed(problem, routing, *weights)
    activation = _swiglu()

    def forward() -> Tensor:
        token_N, expert_N, weight_N = routing.lists()
        return library.moe_general_routing_inputs(
            problem.hidden_TH, weight_N, token_N.int(), expert_N.int(), weights[0], None, weights[1], None,
            routing.num_experts, 0, activation, False, True,
        )[0]  # fmt: skip

    return forward


def _fixed(problem: Problem, routing: Routing, gate_up: Tensor, down: Tensor) -> Forward:
    functional: Any = import_module("sonicmoe.functional")
    make_lists: Any = import_module("sonicmoe.functional.triton_kernels").TC_topk_router_metadata_triton
    shape, activation = problem.shape, _swiglu()
    num_rows, num_experts = shape.num_pairs, shape.num_experts
    assert routing.index_TK is not None, "the general path takes gates"

    def forward() -> Tensor:
        lengths = (num_rows, num_rows, num_experts, num_experts + 1, num_rows)
        scatter, reverse, counts, offsets, gather = (
            torch.empty(length, dtype=torch.int32, device=problem.device) for length in lengths
        )
        index_TK = routing.index_TK.int()  # pyright: ignore[reportOptionalMemberAccess]
        make_lists(index_TK, num_experts, counts, offsets, gather, scatter, reverse)
        lists = (gather, scatter, reverse)
        rest = (shape.top_k, *lists, None, False, activation)
        sizes = (offsets, num_rows)
        act, kept = functional._UpProjection.apply(problem.hidden_TH, gate_up, None, *sizes, *rest, False, True)
        sizes = (offsets, shape.num_tokens)
        return functional._DownProjection.apply(act, kept, down, None, routing.weights, *sizes, *rest)

    return forward


def _swiglu() -> Any:
    return import_module("sonicmoe.enums").ActivationType.SWIGLU


def _keep_default_configuration() -> None:
    """Its tuner's key holds every shape, so that it would tune again whenever the number of pairs changes."""
    tuner: Any = import_module("quack.autotuner").Autotuner

    def run_default(self: Any, *args: Any, **options: Any) -> Any:
        return self.fn(*args, **{**options, "config": None})

    tuner.__call__ = run_default
