"""The Mixture-of-Experts layer: router, plan, experts."""

from torch import Tensor, nn

from remoe.moe.config import MoEConfig
from remoe.moe.dispatch import plan
from remoe.moe.experts import GroupedExperts
from remoe.moe.relu_experts import ReLUExperts
from remoe.moe.routers import build_router
from remoe.moe.routing import RouterContext, Routing


class MoE(nn.Module):
    """A feed-forward layer in which each token uses the experts that its router opens.

    Parameters: `router.*`, `experts.gate_up_proj` [E*G, 2F/G, H], `experts.down_proj` [E*G, H, F/G] (relu experts have
    others).
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        options = {"init_std": config.init_std, **config.router_options}
        self.router = build_router(
            config.router_name, config.hidden_size, config.routed_experts, config.routed_top_k, **options
        )
        self.experts = _build_experts(config)

    def forward(self, hidden_BSH: Tensor, context: RouterContext | None = None) -> tuple[Tensor, Routing]:
        """Return the layer's output, shaped like its input, and the Routing over T = B*S tokens."""
        hidden_TH = hidden_BSH.flatten(0, 1)
        routing = self.router(hidden_TH, context)
        out_TH = self.experts(hidden_TH, plan(routing.routing_map_TE), routing.weights_TE)
        return out_TH.view_as(hidden_BSH), routing


def _build_experts(config: MoEConfig) -> GroupedExperts | ReLUExperts:
    sizes = (config.routed_experts, config.hidden_size, config.expert_size)
    if config.experts == "relu":
        return ReLUExperts(*sizes, dropout=config.dropout)
    return GroupedExperts(*sizes, init_std=config.init_std)
