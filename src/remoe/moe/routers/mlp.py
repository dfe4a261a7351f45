"""A router with one hidden layer: RMoE's control for the size of its router (SMoE-MLP of RMoE §3.4)."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from remoe.config import check_choice, check_range
from remoe.moe import gates
from remoe.moe.initial import Constant, Initial, Normal, Uniform, reset
from remoe.moe.routing import RouterContext, Routing, without_masked_tokens

_MEAN_SQUARE_OF_GELU = 0.42519  # of GELU(z), z ~ N(0, 1)


class MLPRouter(nn.Module):
    """P = softmax(W2 GELU(W1 x + b1) + b2), with the exact GELU.

    Defaults are RMoE's: `mlp_size` 256 (implied by its parameter counts), `bias` b1 and b2, the k gates divided by
    their sum (`renormalize`; null: from k = 2 on), all drawn as torch's Linear (`initial: library`). `normal` draws
    N(0, init_std); `matched` starts with logits as wide as those of a linear router N(0, init_std), for inputs of unit
    mean square; both with b1 = b2 = 0.
    """

    state_size = 0
    penalty = "load_balancing"

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, mlp_size: int = 256, bias: bool = True,
        renormalize: bool | None = None, initial: str = "library", init_std: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        check_range("router option mlp_size", mlp_size, 1)
        check_choice("router option initial", initial, ("library", "normal", "matched"))
        self.top_k = top_k
        self.renormalize = gates.renormalizes(renormalize, top_k)
        self.initial = initial
        self.init_std = init_std
        self.up = nn.Linear(hidden_size, mlp_size, bias)
        self.down = nn.Linear(mlp_size, num_experts, bias)
        reset(self, init_std)

    def initial_values(self) -> Mapping[str, Initial]:
        """As `initial` says."""
        hidden_size, mlp_size = self.up.in_features, self.down.in_features
        if self.initial == "library":
            up, down = Uniform(hidden_size**-0.5), Uniform(mlp_size**-0.5)
            return {"up.weight": up, "up.bias": up, "down.weight": down, "down.bias": down}
        biases = {"up.bias": Constant(0.0), "down.bias": Constant(0.0)}
        if self.initial == "normal":
            return biases
        linear_logit_std = self.init_std * hidden_size**0.5
        down = Normal(linear_logit_std * (mlp_size * _MEAN_SQUARE_OF_GELU) ** -0.5)
        return biases | {"up.weight": Normal(hidden_size**-0.5), "down.weight": down}

    def forward(self, hidden_TH: Tensor, context: RouterContext | None = None) -> Routing:
        """Route T tokens to exactly top_k experts each; the maths runs in fp32 or wider."""
        inner_TM = F.gelu(gates.linear_logits(hidden_TH, self.up.weight, self.up.bias))
        logits_TE = gates.linear_logits(inner_TM, self.down.weight, self.down.bias)
        weights_TE, routing_map_TE = gates.topk_softmax(logits_TE, self.top_k, self.renormalize)
        return without_masked_tokens(Routing(weights_TE, routing_map_TE, logits_TE), context)
