"""The usual router: softmax, then the k most probable experts, dropless (dMoE of ReMoE §4.2)."""

import torch
from torch import Tensor, nn

from remoe.config import check_range
from remoe.moe import gates, initial
from remoe.moe.routing import RouterContext, Routing, without_masked_tokens


class TopKRouter(nn.Module):
    """P = softmax(X W^T); the top_k experts keep their probability as gate, not renormalised unless asked for.

    `warmup_steps` starts nearly dense (ReMoE §4.7): in that many first training steps a token uses `warmup_top_k`
    experts, by default 3/4 of all, where ReLU routing is on average until it is sparse.
    """

    state_size = 0
    penalty = "load_balancing"
    steps_done: Tensor
    """int64, 0-dim: training steps so far; only a router that warms up counts them. It is in the checkpoint."""

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, bias: bool = False, renormalize: bool = False,
        warmup_steps: int = 0, warmup_top_k: int | None = None, init_std: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        check_range("router option warmup_steps", warmup_steps, 0, fix="0 turns the warm-up off")
        if warmup_top_k is None:
            warmup_top_k = max(top_k, 3 * num_experts // 4)
        check_range("router option warmup_top_k", warmup_top_k, top_k, num_experts, fix="it counts experts a token")
        self.top_k = top_k
        self.renormalize = renormalize
        self.warmup_steps = warmup_steps
        self.warmup_top_k = warmup_top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        if warmup_steps:
            self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))
        initial.reset(self, init_std)

    def forward(self, hidden_TH: Tensor, context: RouterContext | None = None) -> Routing:
        """Route T tokens to exactly top_k experts each (warmup_top_k at first); in fp32 or wider."""
        logits_TE = gates.linear_logits(hidden_TH, self.weight, self.bias)
        if self.warmup_steps:
            top_k = torch.where(self.steps_done < self.warmup_steps, self.warmup_top_k, self.top_k)
            weights_TE, routing_map_TE = gates.topk_softmax(logits_TE, self.warmup_top_k, self.renormalize, top_k)
        else:
            weights_TE, routing_map_TE = gates.topk_softmax(logits_TE, self.top_k, self.renormalize)
        return without_masked_tokens(Routing(weights_TE, routing_map_TE, logits_TE), context)

    def after_step(self, tokens_per_expert_E: Tensor, step: int) -> None:
        """Remember that training step number `step` is done."""
        if self.warmup_steps:
            self.steps_done.fill_(step)
