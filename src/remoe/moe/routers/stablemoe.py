"""The StableMoE router of RMoE's base code: projections on unit vectors that start orthogonal (RMoE §3.7)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from remoe.moe import gates
from remoe.moe.initial import Initial, Orthogonal, reset
from remoe.moe.routing import RouterContext, Routing, without_masked_tokens


class StableMoERouter(nn.Module):
    """P = softmax(x . w_e / |w_e|).

    As in the base code it neither distils nor freezes, which the StableMoE paper does. Defaults are the base code's:
    W orthogonal with gain 0.32, the k gates divided by their sum (`renormalize`; null: from k = 2 on).
    """

    state_size = 0
    penalty = "load_balancing"

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, renormalize: bool | None = None, init_std: float = 0.01
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.renormalize = gates.renormalizes(renormalize, top_k)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        reset(self, init_std)

    def initial_values(self) -> Mapping[str, Initial]:
        """Orthogonal; the gain only sets how fast the optimizer turns the vectors."""
        return {"weight": Orthogonal(0.32)}

    def forward(self, hidden_TH: Tensor, context: RouterContext | None = None) -> Routing:
        """Route T tokens to exactly top_k experts each; the maths runs in fp32 or wider."""
        logits_TE = gates.cosine_logits(hidden_TH, self.weight, unit_hidden=False)
        weights_TE, routing_map_TE = gates.topk_softmax(logits_TE, self.top_k, self.renormalize)
        return without_masked_tokens(Routing(weights_TE, routing_map_TE, logits_TE), context)
