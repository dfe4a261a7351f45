"""SparseMixer-v2: the expert is sampled, and a numerical ODE step estimates its gradient (GRIN, Liu et al. 2024)."""

import torch
from torch import Tensor, nn

from remoe.config import check_range
from remoe.moe import gates, initial
from remoe.moe.routing import RouterContext, Routing, without_masked_tokens


class SparseMixerRouter(nn.Module):
    """Sample each token's expert from a softmax over the logits near the largest; evaluation takes the largest.

    `jitter` is epsilon: an expert is near if its relative gap is at most 2 epsilon (0.01 in GRIN's configs). top_k
    above 1 repeats this without the experts already taken. Noise comes from torch's global generator.
    """

    state_size = 0
    draws = True  # random numbers: whoever computes a layer twice must give it the same ones
    penalty = "load_balancing"

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, jitter: float = 0.01, init_std: float = 0.01
    ) -> None:
        super().__init__()
        check_range("router option jitter", jitter, 0.0)
        self.top_k = top_k
        self.jitter = jitter
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        initial.reset(self, init_std)

    def forward(self, hidden_TH: Tensor, context: RouterContext | None = None) -> Routing:
        """Route T tokens to exactly top_k experts each; the maths runs in fp32 or wider."""
        logits_TE = gates.linear_logits(hidden_TH, self.weight)
        weights_TE = torch.zeros_like(logits_TE)
        taken_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
        for _ in range(self.top_k):
            probs_TE = near_softmax(logits_TE, self.jitter, taken_TE)
            chosen_T, is_whole_T = sample(probs_TE) if self.training else best(probs_TE)
            chosen_TE = torch.zeros_like(taken_TE).scatter(1, chosen_T[:, None], True)
            weights_TE = weights_TE + heun_gate(probs_TE, is_whole_T).masked_fill(~chosen_TE, 0)
            taken_TE = taken_TE | chosen_TE
        return without_masked_tokens(Routing(weights_TE, taken_TE, logits_TE), context)


def near_softmax(logits_TE: Tensor, jitter: float, taken_TE: Tensor) -> Tensor:
    """Softmax over the experts not taken whose gap (max - h) / max(|h|, max) is at most 2 * jitter; 0 elsewhere."""
    free_TE = logits_TE.detach().masked_fill(taken_TE, -torch.inf)
    largest_T1 = free_TE.amax(dim=-1, keepdim=True)
    scale_TE = torch.maximum(logits_TE.detach().abs(), largest_T1)
    is_far_TE = (largest_T1 - free_TE) / scale_TE > 2 * jitter  # 0 / 0, all logits 0, is not far
    return logits_TE.masked_fill(is_far_TE | taken_TE, -torch.inf).softmax(dim=-1)


def sample(probs_TE: Tensor) -> tuple[Tensor, Tensor]:
    """An expert of each token drawn by p, int64 [T], and whether its gate is whole: the best one's, else at 1/4."""
    noise_TE = torch.empty_like(probs_TE).exponential_()
    chosen_T = (probs_TE.detach() / noise_TE).argmax(dim=-1)  # as Gumbel-max: log p - log Exp(1)
    is_drawn_T = torch.rand_like(probs_TE[:, 0]) < 0.25
    return chosen_T, is_drawn_T | (chosen_T == probs_TE.argmax(dim=-1))


def best(probs_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable expert of each token with its whole gate."""
    chosen_T = probs_TE.argmax(dim=-1)
    return chosen_T, torch.ones_like(chosen_T, dtype=torch.bool)


def heun_gate(probs_TE: Tensor, is_whole_T: Tensor) -> Tensor:
    """p where the gate is whole, else p / 3; both with the gradient of p (Heun's third-order rule)."""
    less_TE = probs_TE.detach() * (2 / 3)
    return probs_TE - less_TE.masked_fill(is_whole_T[:, None], 0)
