"""The usual router: softmax, then the k most probable experts, dropless (dMoE of ReMoE §4.2)."""

import torch
from torch import Tensor, nn

from remoe.moe import gates, initial
from remoe.moe.routing import RouterContext, Routing, without_masked_tokens


class TopKRouter(nn.Module):
    """P = softmax(X W^T); the top_k experts keep their probability as gate, not renormalised unless asked for."""

    state_size = 0
    penalty = "load_balancing"

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, renormalize: bool = False, init_std: float = 0.01
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.renormalize = renormalize
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        initial.reset(self, init_std)

    def forward(self, hidden_TH: Tensor, context: RouterContext | None = None) -> Routing:
        """Route T tokens to exactly top_k experts each; the maths runs in fp32 or wider."""
        logits_TE = gates.linear_logits(hidden_TH, self.weight)
        weights_TE, routing_map_TE = gates.topk_softmax(logits_TE, self.top_k, self.renormalize)
        return without_masked_tokens(Routing(weights_TE, routing_map_TE, logits_TE), context)
