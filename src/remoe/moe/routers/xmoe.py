"""XMoE's router: tokens and experts compared by angle in a space of few dimensions (arXiv 2204.09179, RMoE §3.6)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from remoe.config import check_choice, check_range
from remoe.errors import ConfigError
from remoe.moe import gates
from remoe.moe.initial import Constant, Initial, Orthogonal, Uniform, reset
from remoe.moe.routing import RouterContext, Routing, without_masked_tokens


class XMoERouter(nn.Module):
    """P = softmax(cos(R x, e_n) / tau) with R [m, H] and embeddings e_n [m].

    Defaults are the papers': `projection_size` m = 16, tau learned from 0.3 (as its logarithm, so it stays above 0), R
    drawn as torch's Linear, orthogonal embeddings of gain 0.32, the k gates divided by their sum (`renormalize`; null:
    from k = 2 on). `form: base` is RMoE's base code, without tau and with the length of R x (its m is 8; its rescaling
    of the embeddings, which changes step sizes only, is left out). `dead_gate` adds the unused Linear(H, E) that the
    published parameter counts include.
    """

    state_size = 0
    penalty = "load_balancing"

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, projection_size: int = 16, temperature: float = 0.3,
        learn_temperature: bool = True, form: str = "paper", dead_gate: bool = False, renormalize: bool | None = None,
        init_std: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        check_range("router option projection_size", projection_size, 1)
        check_choice("router option form", form, ("paper", "base"))
        if temperature <= 0:
            raise ConfigError(f"router option temperature is {temperature}, must be above 0; try 0.3")
        self.top_k = top_k
        self.renormalize = gates.renormalizes(renormalize, top_k)
        self.form = form
        self.temperature = temperature if form == "paper" else 1.0
        self.projection = nn.Parameter(torch.empty(projection_size, hidden_size))
        self.embeddings = nn.Parameter(torch.empty(num_experts, projection_size))
        self.log_temperature = nn.Parameter(torch.empty(1)) if learn_temperature and form == "paper" else None
        self.dead_gate = nn.Linear(hidden_size, num_experts).requires_grad_(False) if dead_gate else None
        reset(self, init_std)

    def initial_values(self) -> Mapping[str, Initial]:
        """The embeddings' directions matter, their length only sets how fast the optimizer turns them."""
        return {
            "projection": Uniform(self.projection.shape[1] ** -0.5),
            "embeddings": Orthogonal(0.32),
            "log_temperature": Constant(math.log(self.temperature)),
        }

    def forward(self, hidden_TH: Tensor, context: RouterContext | None = None) -> Routing:
        """Route T tokens to exactly top_k experts each; the maths runs in fp32 or wider."""
        temperature = self.temperature if self.log_temperature is None else self.log_temperature.exp()
        projected_TM = gates.linear_logits(hidden_TH, self.projection)
        logits_TE = gates.cosine_logits(projected_TM, self.embeddings, temperature, unit_hidden=self.form == "paper")
        weights_TE, routing_map_TE = gates.topk_softmax(logits_TE, self.top_k, self.renormalize)
        return without_masked_tokens(Routing(weights_TE, routing_map_TE, logits_TE), context)
