"""transformers' Mixtral experts with its different implementations; variable counts are padded to the longest list."""

# pyright: reportMissingImports=false

from typing import Any

import torch
from torch import Tensor

from remoe.bench.peers import Forward, NotApplicable
from remoe.bench.problem import Problem, Routing


def eager_loop(problem: Problem, routing: Routing) -> Forward:
    """The library's loop over experts."""
    return _forward(_experts(problem, routing, "eager"), problem, routing)


def grouped_mm(problem: Problem, routing: Routing) -> Forward:
    """Its grouped matrix products."""
    return _forward(_experts(problem, routing, "grouped_mm"), problem, routing)


def grouped_mm_compiled(problem: Problem, routing: Routing) -> Forward:
    """The same through torch.compile; the padded lists are made eagerly."""
    torch._dynamo.reset()
    return _forward(torch.compile(_experts(problem, routing, "grouped_mm"), dynamic=False), problem, routing)


def _experts(problem: Problem, routing: Routing, implementation: str) -> Any:
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    shape = problem.shape
    config = MixtralConfig(
        hidden_size=shape.hidden_size, intermediate_size=shape.expert_size, num_local_experts=shape.num_experts
    )
    if implementation != "eager" and not _has(implementation):
        raise NotApplicable(f"this transformers has no {implementation} experts")
    if routing.index_TK is None and not _takes_gaps():
        raise NotApplicable("transformers takes lists with gaps from 5.20 on")
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts: Any = MixtralExperts(config)
    experts.gate_up_proj, experts.down_proj = problem.gate_up_proj, problem.down_proj
    experts._is_expert_parallel = routing.index_TK is None  # only then is expert E a gap
    return experts


def _has(implementation: str) -> bool:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return implementation in ALL_EXPERTS_FUNCTIONS.valid_keys()


def _takes_gaps() -> bool:
    from transformers import __version__

    major, minor, *_ = __version__.split(".")
    return (int(major), int(minor)) >= (5, 20)


def _forward(experts: Any, problem: Problem, routing: Routing) -> Forward:
    def forward() -> Tensor:
        return experts(problem.hidden_TH, *routing.padded())

    return forward
