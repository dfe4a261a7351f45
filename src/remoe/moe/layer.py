"""The Mixture-of-Experts layer: router, plan, experts."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from remoe.errors import ConfigError
from remoe.moe.config import MoEConfig
from remoe.moe.dispatch import plan_of
from remoe.moe.experts import GroupedExperts, MergedExperts, in_compute_dtype
from remoe.moe.relu_experts import ReLUExperts
from remoe.moe.routers import build_router, option_names
from remoe.moe.routing import RouterContext, Routing

_FEW_PAIRS = 65536  # lists and rows of so many pairs cost little: allocate for all of them rather than wait


class Capacity(NamedTuple):
    """What one exchange of a layer makes room for; the same on all ranks."""

    rows: int
    """From each rank to each."""
    pairs: int
    """Active (token, expert) pairs at a rank."""


class Exchange(Protocol):
    """Runs a layer's experts where ranks share them: expert parallelism."""

    capacity: Capacity | None
    """None: exact, for which the host waits."""

    def has_room(self, capacity: Capacity, num_tokens: int) -> bool:
        """Whether so many rows are within what may come to a rank of so many tokens at once."""
        ...

    def __call__(self, experts: nn.Module, hidden_TH: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        """The output [T, H], and the routing with what the exchange knows of its needs. Tokens come in the dtype of
        matrix products, and travel in it.
        """
        ...


class MoE(nn.Module):
    """A feed-forward layer in which each token uses the experts that its router opens.

    Parameters: `router.*`, `experts.gate_up_proj` [E*G, 2F/G, H], `experts.down_proj` [E*G, H, F/G] (relu experts have
    others).
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.router = _build_router(config)
        self.experts = _build_experts(config, getattr(self.router, "experts", "grouped"))
        self.exchange: Exchange | None = None
        self.row_capacity: int | None = None
        """Rows that a call allocates, for training without waiting; null: as many as the routing has active pairs, for
        whose number a GPU waits. A routing with more pairs sets its `overflow`: its output is void, run it again."""

    def forward(self, hidden_BSH: Tensor, context: RouterContext | None = None) -> tuple[Tensor, Routing]:
        """Return the layer's output, shaped like its input, and the Routing over T = B*S tokens.

        Router and experts read the same tokens, in the dtype of matrix products; the router's maths is in fp32.
        """
        hidden_TH = in_compute_dtype(hidden_BSH.flatten(0, 1))
        routing = self.router(hidden_TH, context)
        if self.exchange is not None:
            out_TH, routing = self.exchange(self.experts, hidden_TH, routing)
            return out_TH.view_as(hidden_BSH), routing
        plan = plan_of(routing, self._capacity(routing))
        out_TH = self.experts(hidden_TH, plan, routing.weights_TE)
        return out_TH.view_as(hidden_BSH), routing._replace(overflow=getattr(plan, "overflow", None))

    def _capacity(self, routing: Routing) -> int | None:
        if not isinstance(self.experts, GroupedExperts):
            return None
        num_pairs = routing.routing_map_TE.numel()
        is_small = num_pairs <= _FEW_PAIRS and routing.routing_map_TE.is_cuda and not torch.is_grad_enabled()
        return num_pairs if is_small else self.row_capacity


def moe_layers(model: nn.Module) -> list[MoE]:
    """The MoE layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def _build_router(config: MoEConfig) -> nn.Module:
    given = {"init_std": config.init_std, "vocab_size": config.vocab_size}
    known = option_names(config.router_name)
    options = {key: value for key, value in given.items() if key in known} | config.router_options
    return build_router(config.router_name, config.hidden_size, config.routed_experts, config.routed_top_k, **options)


def _build_experts(config: MoEConfig, kind: str) -> GroupedExperts | ReLUExperts | MergedExperts:
    sizes = (config.routed_experts, config.hidden_size, config.expert_size)
    if kind == "merged":
        if config.experts != "swiglu":
            raise ConfigError(f"experts is {config.experts!r}, must be 'swiglu' with router {config.router_name!r}")
        return MergedExperts(*sizes, init_std=config.init_std)
    if config.experts == "relu":
        return ReLUExperts(*sizes, dropout=config.dropout)
    experts = GroupedExperts(*sizes, init_std=config.init_std)
    experts.kernels, experts.kept_rows_per_token = config.kernels, config.kept_rows_per_token
    return experts
