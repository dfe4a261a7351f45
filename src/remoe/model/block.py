"""One decoder layer: attention, then experts or a dense MLP, each behind a norm and added to the residual stream."""

import torch.nn.functional as F
from torch import Tensor, nn

from remoe.model.attention import Attention, AttentionInputs
from remoe.model.config import ReMoEConfig
from remoe.model.linear import Linear
from remoe.moe import MoE, RouterContext, Routing
from remoe.moe.experts import in_compute_dtype


class DenseMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Called like an MoE layer; it has no routing and ignores the context."""

    def __init__(self, config: ReMoEConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_BSH: Tensor, context: RouterContext | None = None) -> tuple[Tensor, None]:
        """The output and no routing."""
        hidden_BSH = in_compute_dtype(hidden_BSH)
        return self.down_proj(F.silu(self.gate_proj(hidden_BSH)) * self.up_proj(hidden_BSH)), None


class DecoderLayer(nn.Module):
    """hidden + attention(norm(hidden)), then the same with the MLP."""

    def __init__(self, config: ReMoEConfig, layer_index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = Attention(config, layer_index)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MoE(config.moe) if config.is_moe_layer(layer_index) else DenseMLP(config)

    def forward(
        self, hidden_BSH: Tensor, attention: AttentionInputs, context: RouterContext
    ) -> tuple[Tensor, Routing | None]:
        """The new residual stream and, from an MoE layer, its routing."""
        hidden_BSH = hidden_BSH + self.self_attn(self.input_layernorm(hidden_BSH), attention)
        out_BSH, routing = self.mlp(self.post_attention_layernorm(hidden_BSH), context)
        return hidden_BSH + out_BSH, routing
