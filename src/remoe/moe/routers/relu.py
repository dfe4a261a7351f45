"""ReMoE's router: the gate is the ReLU of a linear map, so each token uses 0 to E experts and gradients are exact."""

import torch
from torch import Tensor, nn

from remoe.moe import gates, initial
from remoe.moe.routing import RouterContext, Routing, without_masked_tokens


class ReLURouter(nn.Module):
    """R = ReLU(X W^T) (ReMoE eq. 6); no softmax, no top-k. `top_k` only sets the target that the trainer steers to."""

    state_size = 0
    penalty = "sparsity_l1"

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, init_std: float = 0.01) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        initial.reset(self, init_std)

    def forward(self, hidden_TH: Tensor, context: RouterContext | None = None) -> Routing:
        """Route T tokens; the maths runs in fp32 or wider."""
        logits_TE = gates.linear_logits(hidden_TH, self.weight)
        weights_TE, routing_map_TE = gates.relu(logits_TE)
        return without_masked_tokens(Routing(weights_TE, routing_map_TE, logits_TE), context)
