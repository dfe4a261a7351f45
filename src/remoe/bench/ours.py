"""Our layer after the router, as `MoE` runs it: the one place that knows how the op is called."""

from collections.abc import Callable

import torch
from torch import Tensor

from remoe.bench.peers import NotApplicable
from remoe.bench.problem import Problem, Routing
from remoe.bench.shapes import LayerShape
from remoe.errors import ConfigError
from remoe.kernels.expert_mlp import backends
from remoe.moe import MoE, MoEConfig
from remoe.moe.dispatch import plan
from remoe.moe.experts import GroupedExperts

Forward = Callable[[], Tensor]
Builder = Callable[[Problem, Routing], Forward]

CAPACITY_MARGIN = 1.25


class Captured:
    """A forward that is to be timed as a CUDA graph."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def __call__(self) -> Tensor:
        return self.forward()


def exact(problem: Problem, routing: Routing) -> Forward:
    """As many rows as there are pairs, all kept for the backward pass: on a GPU each call waits for that number."""
    return _layer(problem, routing, _experts(problem))


def capacity(problem: Problem, routing: Routing) -> Forward:
    """Rows for CAPACITY_MARGIN times the pairs, as in a training step that never waits."""
    return _layer(problem, routing, _experts(problem), int(problem.shape.num_pairs * CAPACITY_MARGIN))


def graph(problem: Problem, routing: Routing) -> Forward:
    """As `capacity`, replayed as a CUDA graph: what the kernels take, without launching them one by one."""
    if not problem.hidden_TH.is_cuda:
        raise NotApplicable("graphs need a GPU")
    return Captured(capacity(problem, routing))


def chunked(problem: Problem, routing: Routing) -> Forward:
    """As a model's layer is by default: rows above what its steady state needs are worked off in chunks."""
    experts = _experts(problem)
    experts.kept_rows_per_token = _kept_rows_per_token(problem.shape)
    if problem.shape.num_pairs <= experts.row_cap(problem.shape.num_tokens):
        raise NotApplicable("no more rows than a layer keeps: the same as without chunks")
    return _layer(problem, routing, experts)


def _backend(name: str) -> Builder:
    """The layer with this back-end and no other; NotApplicable where it cannot run."""

    def build(problem: Problem, routing: Routing) -> Forward:
        try:
            backends.pick(name, problem.hidden_TH)
        except ConfigError as error:
            raise NotApplicable(str(error)) from None
        experts = _experts(problem)
        experts.kernels = name
        return _layer(problem, routing, experts)

    return build


COLUMNS: dict[str, Builder] = {
    "remoe": exact,
    "remoe_capacity": capacity,
    "remoe_graph": graph,
    "remoe_chunked": chunked,
}
COLUMNS |= {f"remoe_{name}": _backend(name) for name in backends.NAMES if name != "auto"}


def default_columns(device: torch.device) -> list[str]:
    """All that differ on the device but the explicit back-ends: a CPU neither waits nor works in chunks."""
    return ["remoe", "remoe_capacity", "remoe_graph", "remoe_chunked"] if device.type == "cuda" else ["remoe"]


def _experts(problem: Problem) -> GroupedExperts:
    shape = problem.shape
    with torch.device("meta"):
        experts = GroupedExperts(shape.num_experts, shape.hidden_size, shape.expert_size)
    experts.gate_up_proj, experts.down_proj = problem.gate_up_proj, problem.down_proj
    return experts


def _kept_rows_per_token(shape: LayerShape) -> float:
    """As `MoE` sets it."""
    config = MoEConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.expert_size,
        num_experts=shape.num_experts,
        top_k=shape.steady_top_k,
    )
    with torch.device("meta"):
        layer = MoE(config)
    assert isinstance(layer.experts, GroupedExperts), "swiglu is the default"
    return layer.experts.kept_rows_per_token


def _layer(problem: Problem, routing: Routing, experts: GroupedExperts, rows: int | None = None) -> Forward:
    """From gates and routing map to the output; for topk these are made from indices and weights first."""

    def forward() -> Tensor:
        weights_TE, routing_map_TE = routing.dense()
        return experts(problem.hidden_TH, plan(routing_map_TE, rows), weights_TE)

    return forward
