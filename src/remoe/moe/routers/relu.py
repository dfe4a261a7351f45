"""ReMoE's router: the gate is the ReLU of a linear map, so each token uses 0 to E experts and gradients are exact."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from remoe.errors import ConfigError
from remoe.moe import gates, initial
from remoe.moe.routing import RouterContext, Routing, without_masked_tokens


class ReLURouter(nn.Module):
    """R = ReLU(X W^T) (ReMoE eq. 6); no softmax, no top-k. `top_k` only sets the target that the trainer steers to.

    `normalize` divides a token's gates by their root mean square and multiplies them by a learnable `scale` [E]
    (BlockFFN): which experts are on then says nothing about how large their gates are, and the L1 term, which sums R
    before that, no longer shrinks the layer's output. `bias` adds a learnable b [E] to the logits, which converted
    routers need.
    """

    state_size = 0
    penalty = "sparsity_l1"
    threshold: float = 0.0
    """What a logit must be above for its expert to be used: the density dial (moe.dial); 0 is the trained gate."""

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, normalize: bool = False, init_scale: float = 1.0,
        eps: float = 1e-6, bias: bool = False, init_std: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        if eps <= 0:
            raise ConfigError(f"router option eps is {eps}, must be above 0; try 1e-6")
        self.top_k = top_k
        self.init_scale = init_scale
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        self.scale = nn.Parameter(torch.empty(num_experts)) if normalize else None
        initial.reset(self, init_std)

    def initial_values(self) -> Mapping[str, initial.Initial]:
        """The scale starts the same for all experts, the bias at 0."""
        values = {"scale": initial.Constant(self.init_scale), "bias": initial.Constant(0.0)}
        return {name: value for name, value in values.items() if getattr(self, name) is not None}

    def forward(self, hidden_TH: Tensor, context: RouterContext | None = None) -> Routing:
        """Route T tokens; the maths runs in fp32 or wider."""
        logits_TE = gates.linear_logits(hidden_TH, self.weight, self.bias)
        weights_TE, routing_map_TE = gates.relu(logits_TE, self.threshold)
        routing = Routing(weights_TE, routing_map_TE, logits_TE)
        if self.scale is not None:
            normalized_TE = gates.rms_normalized(weights_TE, self.scale, self.eps)
            routing = routing._replace(weights_TE=normalized_TE, penalized_TE=weights_TE)
        return without_masked_tokens(routing, context)
