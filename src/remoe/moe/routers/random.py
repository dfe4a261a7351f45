"""A linear router that stays as it was drawn: what does learning to route add? (RandomMoE of RMoE §3.2)"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from remoe.config import check_choice
from remoe.moe import gates
from remoe.moe.initial import Constant, Initial, Uniform, reset
from remoe.moe.routing import RouterContext, Routing, without_masked_tokens


class RandomRouter(nn.Module):
    """P = softmax(X W^T + c) with W and c frozen at their first values; the experts still learn through the gates.

    Defaults are RMoE's small runs: `bias` c as well, both drawn as torch's Linear (`initial: library`; `normal` is
    N(0, init_std) and c = 0), the k gates divided by their sum (`renormalize`; null: from k = 2 on).
    """

    state_size = 0
    penalty = "load_balancing"

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, bias: bool = True,
        renormalize: bool | None = None, initial: str = "library", init_std: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("router option initial", initial, ("library", "normal"))
        self.top_k = top_k
        self.renormalize = gates.renormalizes(renormalize, top_k)
        self.initial = initial
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(num_experts), requires_grad=False) if bias else None
        reset(self, init_std)

    def initial_values(self) -> Mapping[str, Initial]:
        """As `initial` says."""
        if self.initial == "normal":
            return {"bias": Constant(0.0)}
        library = Uniform(self.weight.shape[1] ** -0.5)
        return {"weight": library, "bias": library}

    def forward(self, hidden_TH: Tensor, context: RouterContext | None = None) -> Routing:
        """Route T tokens to exactly top_k experts each; the maths runs in fp32 or wider."""
        logits_TE = gates.linear_logits(hidden_TH, self.weight, self.bias)
        weights_TE, routing_map_TE = gates.topk_softmax(logits_TE, self.top_k, self.renormalize)
        return without_masked_tokens(Routing(weights_TE, routing_map_TE, logits_TE), context)
