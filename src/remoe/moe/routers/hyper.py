"""HyperRouter: a frozen random network writes a linear router from a learned embedding (2312.07035, RMoE §3.3)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from remoe.config import check_choice, check_range
from remoe.moe import gates
from remoe.moe.initial import Constant, Initial, Normal, Uniform, reset
from remoe.moe.routing import RouterContext, Routing, without_masked_tokens


class HyperRouter(nn.Module):
    """P = softmax(W(e) x + c(e)), where (W | c)(e) = U2 ReLU(U1 e + d1) + d2 as E rows; only e [H] learns.

    Defaults are RMoE's: `hyper_size` 256 (required by its parameter counts; the original scripts pass 64), e ~ N(0, 1),
    the frozen network drawn as torch's Linear (`initial: library`), the k gates divided by their sum (`renormalize`;
    null: from k = 2 on). `matched` starts with W(e) as wide as a linear router N(0, init_std). `dead_gate` adds the
    unused Linear(H, E) that the published parameter counts include.
    """

    state_size = 0
    penalty = "load_balancing"

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, hyper_size: int = 256, dead_gate: bool = False,
        renormalize: bool | None = None, initial: str = "library", init_std: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        check_range("router option hyper_size", hyper_size, 1)
        check_choice("router option initial", initial, ("library", "matched"))
        self.top_k = top_k
        self.renormalize = gates.renormalizes(renormalize, top_k)
        self.initial = initial
        self.init_std = init_std
        self.embedding = nn.Parameter(torch.empty(hidden_size))
        self.up = nn.Linear(hidden_size, hyper_size).requires_grad_(False)
        self.down = nn.Linear(hyper_size, num_experts * (hidden_size + 1)).requires_grad_(False)
        self.dead_gate = nn.Linear(hidden_size, num_experts).requires_grad_(False) if dead_gate else None
        reset(self, init_std)

    def initial_values(self) -> Mapping[str, Initial]:
        """As `initial` says."""
        hidden_size, hyper_size = self.up.in_features, self.down.in_features
        if self.initial == "library":
            up, down = Uniform(hidden_size**-0.5), Uniform(hyper_size**-0.5)
            values = {"up.weight": up, "up.bias": up, "down.weight": down, "down.bias": down}
            return {"embedding": Normal(1.0), **values}
        return {
            "embedding": Normal(1.0),
            "up.weight": Normal(hidden_size**-0.5),
            "up.bias": Constant(0.0),
            "down.weight": Normal(self.init_std * (hyper_size / 2) ** -0.5),  # ReLU halves the mean square
            "down.bias": Constant(0.0),
        }

    def forward(self, hidden_TH: Tensor, context: RouterContext | None = None) -> Routing:
        """Route T tokens to exactly top_k experts each; the maths runs in fp32 or wider."""
        logits_TE = gates.linear_logits(hidden_TH, *self.generated())
        weights_TE, routing_map_TE = gates.topk_softmax(logits_TE, self.top_k, self.renormalize)
        return without_masked_tokens(Routing(weights_TE, routing_map_TE, logits_TE), context)

    def generated(self) -> tuple[Tensor, Tensor]:
        """The router that the embedding stands for: weight [E, H] and bias [E]."""
        inner = gates.linear_logits(self.embedding, self.up.weight, self.up.bias).relu()
        rows = gates.linear_logits(inner, self.down.weight, self.down.bias).view(-1, len(self.embedding) + 1)
        return rows[:, :-1], rows[:, -1]
