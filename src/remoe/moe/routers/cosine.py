"""Cosine router: the angle between a token and each expert decides, their lengths do not (CosineMoE of RMoE §3.5)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from remoe.errors import ConfigError
from remoe.moe import gates
from remoe.moe.initial import Constant, Initial, reset
from remoe.moe.routing import RouterContext, Routing, without_masked_tokens


class CosineRouter(nn.Module):
    """P = softmax(cos(x, w_e) / tau).

    Defaults are RMoE's: tau learned (`learn_temperature`), the k gates divided by their sum (`renormalize`; null: from
    k = 2 on). `temperature`, tau's first value, is XMoE's 0.3: RMoE gives none. tau is learned as its logarithm, so it
    stays above 0. The w_e start as a linear router's; only their directions matter.
    """

    state_size = 0
    penalty = "load_balancing"

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, temperature: float = 0.3,
        learn_temperature: bool = True, renormalize: bool | None = None, init_std: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        if temperature <= 0:
            raise ConfigError(f"router option temperature is {temperature}, must be above 0; try 0.3")
        self.top_k = top_k
        self.renormalize = gates.renormalizes(renormalize, top_k)
        self.temperature = temperature
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.log_temperature = nn.Parameter(torch.empty(1)) if learn_temperature else None
        reset(self, init_std)

    def initial_values(self) -> Mapping[str, Initial]:
        """The temperature starts where it is told."""
        return {"log_temperature": Constant(math.log(self.temperature))}

    def forward(self, hidden_TH: Tensor, context: RouterContext | None = None) -> Routing:
        """Route T tokens to exactly top_k experts each; the maths runs in fp32 or wider."""
        temperature = self.temperature if self.log_temperature is None else self.log_temperature.exp()
        logits_TE = gates.cosine_logits(hidden_TH, self.weight, temperature)
        weights_TE, routing_map_TE = gates.topk_softmax(logits_TE, self.top_k, self.renormalize)
        return without_masked_tokens(Routing(weights_TE, routing_map_TE, logits_TE), context)
