"""DeepSeek-V3's router: sigmoid scores, and a bias in place of a balance loss (arXiv 2408.15664, 2412.19437)."""

import torch
from torch import Tensor, nn

from remoe.config import check_range
from remoe.moe import gates, initial
from remoe.moe.routing import RouterContext, Routing, without_masked_tokens


class LossFreeRouter(nn.Module):
    """s = sigmoid(X W^T); the top_k experts by s + b are used, gate = s; b evens the load (2408.15664 §3).

    After each training step b of an expert with more than the mean load falls by `bias_step`, with less it rises; no
    gradient pulls at the router for balance. Gates are divided by their sum (`renormalize`; null: from k = 2 on) and
    multiplied by `scale` (DeepSeek-V3: 2.5), both without b.
    """

    state_size = 0
    penalty = "none"
    load_bias: Tensor
    """b, fp32 [E]; it is in the checkpoint."""

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, bias_step: float = 0.001,
        renormalize: bool | None = None, scale: float = 1.0, init_std: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        check_range("router option bias_step", bias_step, 0.0)
        self.top_k = top_k
        self.bias_step = bias_step
        self.renormalize = gates.renormalizes(renormalize, top_k)
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("load_bias", torch.zeros(num_experts))
        initial.reset(self, init_std)

    def forward(self, hidden_TH: Tensor, context: RouterContext | None = None) -> Routing:
        """Route T tokens to exactly top_k experts each; the maths runs in fp32 or wider."""
        logits_TE = gates.linear_logits(hidden_TH, self.weight)
        scores_TE = logits_TE.sigmoid()
        index_TK = (scores_TE.detach() + self.load_bias).topk(self.top_k, dim=-1).indices
        routing_map_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, index_TK, True)
        weights_TE = scores_TE.masked_fill(~routing_map_TE, 0)
        if self.renormalize:
            weights_TE = weights_TE / weights_TE.sum(dim=-1, keepdim=True)
        return without_masked_tokens(Routing(self.scale * weights_TE, routing_map_TE, logits_TE), context)

    def after_step(self, tokens_per_expert_E: Tensor, step: int) -> None:
        """Move b by the step's loads, counted over all ranks."""
        missing_E = tokens_per_expert_E.sum() - tokens_per_expert_E * len(tokens_per_expert_E)  # E x (mean - load)
        self.load_bias.add_(self.bias_step * missing_E.sign().to(self.load_bias.dtype))
