"""The Mixture-of-Experts layer: router, plan, experts."""

from torch import Tensor, nn

from remoe.errors import ConfigError
from remoe.moe.config import MoEConfig
from remoe.moe.dispatch import plan_of
from remoe.moe.experts import GroupedExperts, MergedExperts
from remoe.moe.relu_experts import ReLUExperts
from remoe.moe.routers import build_router, option_names
from remoe.moe.routing import RouterContext, Routing


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

    def forward(self, hidden_BSH: Tensor, context: RouterContext | None = None) -> tuple[Tensor, Routing]:
        """Return the layer's output, shaped like its input, and the Routing over T = B*S tokens."""
        hidden_TH = hidden_BSH.flatten(0, 1)
        routing = self.router(hidden_TH, context)
        out_TH = self.experts(hidden_TH, plan_of(routing), routing.weights_TE)
        return out_TH.view_as(hidden_BSH), routing


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
    return GroupedExperts(*sizes, init_std=config.init_std)
