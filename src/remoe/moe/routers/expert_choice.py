"""Expert Choice: each expert takes its c = T k / E most probable tokens of the call (Zhou et al. 2022)."""

import torch
from torch import Tensor, nn

from remoe.config import check_choice, check_range
from remoe.moe import gates, initial
from remoe.moe.routing import RouterContext, Routing, without_masked_tokens


class ExpertChoiceRouter(nn.Module):
    """P = softmax(X W^T); every expert takes its top c tokens by P, gate = P. A token has 0 to E experts.

    c is rounded down, but at least 1. Which tokens are taken depends on later ones, so training leaks the future, and
    so does `leaky` evaluation, which chooses in the same way. `causal` evaluation opens a gate where P reaches the
    expert's threshold: the running mean, over the last `window` training steps, of the least probability that it took.
    With a cache (token by token) only the thresholds make sense and are used.
    """

    state_size = 0
    penalty = "none"
    mixes_tokens = True
    evaluations = ("leaky", "causal")
    thresholds: Tensor
    num_observed: Tensor

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *,
        evaluation: str = "leaky", window: int = 100, init_std: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("router option evaluation", evaluation, self.evaluations)
        check_range("router option window", window, 1)
        self.num_experts = num_experts
        self.top_k = top_k
        self.evaluation = evaluation
        self.window = window
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("thresholds", torch.full((num_experts,), 1 / num_experts))
        self.register_buffer("num_observed", torch.zeros((), dtype=torch.int64))
        initial.reset(self, init_std)

    def forward(self, hidden_TH: Tensor, context: RouterContext | None = None) -> Routing:
        """Let each expert choose among the T tokens that are not masked; the maths runs in fp32 or wider."""
        logits_TE = gates.linear_logits(hidden_TH, self.weight)
        probs_TE = logits_TE.softmax(dim=-1)
        has_cache = context is not None and context.cache is not None
        if not self.training and (has_cache or self.evaluation == "causal"):
            chosen_TE = probs_TE >= self.thresholds
        else:
            chosen_TE = self._most_probable(probs_TE.detach(), None if context is None else context.token_mask_T)
        return without_masked_tokens(Routing(probs_TE.masked_fill(~chosen_TE, 0), chosen_TE, logits_TE), context)

    def observe(self, routing: Routing) -> Tensor:
        """The least probability that each expert took, [E]; infinite where it took no token."""
        return routing.weights_TE.masked_fill(~routing.routing_map_TE, torch.inf).amin(0)

    def absorb(self, observed: Tensor) -> None:
        """Move the thresholds towards those of one training step."""
        self.num_observed += 1
        share = 1 / self.num_observed.clamp(max=self.window)
        moved = self.thresholds + share * (observed.to(self.thresholds.dtype) - self.thresholds)
        self.thresholds.copy_(torch.where(observed.isfinite(), moved, self.thresholds))

    def _most_probable(self, probs_TE: Tensor, token_mask_T: Tensor | None) -> Tensor:
        """Bool [T, E]: exactly c tokens of each expert; of equal ones the earlier."""
        index_T1 = torch.arange(len(probs_TE), device=probs_TE.device)[:, None]
        counted_T = torch.ones_like(index_T1[:, 0], dtype=torch.bool) if token_mask_T is None else token_mask_T
        capacity = (counted_T.sum() * self.top_k // self.num_experts).clamp(min=1)
        order_TE = probs_TE.masked_fill(~counted_T[:, None], -1).argsort(dim=0, descending=True, stable=True)
        taken_TE = (index_T1 < capacity).expand_as(order_TE)
        return torch.zeros_like(taken_TE).scatter(0, order_TE, taken_TE)
