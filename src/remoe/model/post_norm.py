"""The layer of RMoE's character models, a post-norm switch transformer (RMoE §2.7(b))."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from remoe.model.config import ReMoEConfig
from remoe.model.linear import Linear
from remoe.model.relative_attention import RelativeAttention, RelativeInputs
from remoe.moe import MoE, RouterContext, Routing
from remoe.moe.experts import in_compute_dtype
from remoe.moe.initial import Constant, Initial, Normal, Uniform


class ReLUMLP(nn.Module):
    """down(dropout(relu(up x + b))) + c. Called like an MoE layer; it has no routing and ignores the context."""

    def __init__(self, config: ReMoEConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def initial_values(self) -> Mapping[str, Initial]:
        """torch's own for linear maps."""
        return linear_values("up_proj", self.up_proj) | linear_values("down_proj", self.down_proj)

    def forward(self, hidden_BSH: Tensor, context: RouterContext | None = None) -> tuple[Tensor, None]:
        """The output and no routing."""
        act_BSF = self.up_proj(in_compute_dtype(hidden_BSH)).relu()
        return self.down_proj(F.dropout(act_BSF, self.dropout, self.training)), None


class PostNormLayer(nn.Module):
    """a = norm(hidden + attention(hidden)), which the router and experts read; then norm(a + norm(a + experts(a))).

    So an MoE layer adds its residual twice and normalises twice. A dense layer is norm(a + mlp(a)); its norm is there
    in an MoE layer too, unused: the base has it and the published parameter counts include it.
    """

    def __init__(self, config: ReMoEConfig, layer_index: int) -> None:
        super().__init__()
        is_moe = config.is_moe_layer(layer_index)
        self.dropout = config.dropout
        self.self_attn = RelativeAttention(config, layer_index)
        self.mlp = MoE(config.moe) if is_moe else ReLUMLP(config)
        self.attention_norm = _norm(config)
        self.inner_norm = _norm(config) if is_moe else None
        self.moe_norm = _norm(config) if is_moe else None
        self.dense_norm = _norm(config)

    def initial_values(self) -> Mapping[str, Initial]:
        """Norms start as the identity."""
        norms = ("attention_norm", "inner_norm", "moe_norm", "dense_norm")
        return {f"{norm}.weight": Constant(1.0) for norm in norms} | {f"{norm}.bias": Constant(0.0) for norm in norms}

    def forward(
        self, hidden_BSH: Tensor, attention: RelativeInputs, context: RouterContext
    ) -> tuple[Tensor, Routing | None]:
        """The new hidden states and, from an MoE layer, its routing."""
        hidden_BSH = self.attention_norm(hidden_BSH + self.self_attn(hidden_BSH, attention))
        out_BSH, routing = self.mlp(hidden_BSH, context)
        if self.inner_norm is None or self.moe_norm is None:
            return self.dense_norm(hidden_BSH + out_BSH), routing
        inner_BSH = self.inner_norm(hidden_BSH + F.dropout(out_BSH, self.dropout, self.training))
        return self.moe_norm(hidden_BSH + inner_BSH), routing


def linear_values(name: str, linear: nn.Linear) -> dict[str, Initial]:
    """torch's own initial values of a linear map, by parameter name."""
    uniform = Uniform(linear.in_features**-0.5)
    return {f"{name}.weight": uniform, f"{name}.bias": uniform}


def outer_values(hidden_size: int) -> dict[str, Initial]:
    """Initial values of embedding and output head, as in the base."""
    uniform = Uniform(hidden_size**-0.5)
    return {"model.embed_tokens.weight": Normal(1.0), "lm_head.weight": uniform, "lm_head.bias": uniform}


def _norm(config: ReMoEConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
