"""Grouped-query causal self-attention with rotary positions, through scaled_dot_product_attention."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remoe.kernels.rotary_angles import rotary_angles
from remoe.model.cache import AnyCache, CacheWindow
from remoe.model.config import ReMoEConfig
from remoe.model.linear import Linear
from remoe.model.placement import Placement
from remoe.model.rotary import rotate
from remoe.model.sequence import WHOLE, WholeSequence
from remoe.moe.experts import in_compute_dtype


class AttentionInputs(NamedTuple):
    """What every layer's attention shares in one call."""

    cos: Tensor
    sin: Tensor
    """Rotary angles, fp32 [B or 1, 1, S, D/2]."""
    mask: Tensor | None
    """[B or 1, 1, S, K], bool, or added to the scores; None: plain causal, or one new token that sees all."""
    cache: AnyCache | None


class RotaryPositions(nn.Module):
    """Rotary angles of all tokens; no parameters."""

    def __init__(self, config: ReMoEConfig) -> None:
        super().__init__()
        self.head_size = config.head_width
        self.theta = config.rope_theta

    def forward(self, placement: Placement, cache: AnyCache | None) -> AttentionInputs:
        """The angles, and which tokens each one may attend to."""
        cos, sin = rotary_angles(placement.position_BS, self.head_size, self.theta)
        mask = placement.attention_mask
        if mask is not None and isinstance(cache, CacheWindow):
            mask = _added(mask, cache.dtype)
        return AttentionInputs(cos, sin, mask, cache)


class Attention(nn.Module):
    """Multi-head attention whose key/value heads are shared by groups of query heads."""

    def __init__(self, config: ReMoEConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.sequence: WholeSequence = WHOLE
        self.head_size = config.head_width
        self.q_proj = Linear(config.hidden_size, config.num_heads * self.head_size)
        self.k_proj = Linear(config.hidden_size, config.kv_heads * self.head_size)
        self.v_proj = Linear(config.hidden_size, config.kv_heads * self.head_size)
        self.o_proj = Linear(config.num_heads * self.head_size, config.hidden_size)

    def forward(self, hidden_BSH: Tensor, inputs: AttentionInputs) -> Tensor:
        """Attend within the batch and, with a cache, to the tokens before it."""
        hidden_BSH = self.sequence.gather_tokens(in_compute_dtype(hidden_BSH))
        query_BASD = rotate(self._heads(self.q_proj(hidden_BSH)), inputs.cos, inputs.sin)
        key_BASD = rotate(self._heads(self.k_proj(hidden_BSH)), inputs.cos, inputs.sin)
        value_BASD = self._heads(self.v_proj(hidden_BSH))
        if inputs.cache is not None:
            key_BASD, value_BASD = inputs.cache.update(self.layer_index, key_BASD, value_BASD)
        mixed_BASD = attend(query_BASD, key_BASD, value_BASD, inputs.mask)
        mixed_BSX = self.sequence.heads_to_tokens(mixed_BASD.transpose(1, 2).flatten(2))
        return self.sequence.scatter_tokens(self.o_proj(mixed_BSX))

    def _heads(self, projected_BSX: Tensor) -> Tensor:
        return self.sequence.tokens_to_heads(projected_BSX).unflatten(-1, (-1, self.head_size)).transpose(1, 2)


def attend(query_BASD: Tensor, key_BASD: Tensor, value_BASD: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention; keys and values may have fewer heads (A is then theirs)."""
    num_groups = query_BASD.shape[1] // key_BASD.shape[1]
    # only the flash kernel shares heads, and it takes neither a mask nor fp32; elsewhere sharing means the slow
    # path that stores all scores
    can_share = mask is None and query_BASD.dtype in (torch.bfloat16, torch.float16)
    if num_groups > 1 and query_BASD.shape[2] == 1 and not can_share:
        return _attend_in_groups(query_BASD, key_BASD, value_BASD, mask)
    if num_groups > 1 and not can_share:
        key_BASD, value_BASD = (heads.repeat_interleave(num_groups, dim=1) for heads in (key_BASD, value_BASD))
    return F.scaled_dot_product_attention(
        query_BASD,
        key_BASD,
        value_BASD,
        attn_mask=mask,
        is_causal=mask is None and query_BASD.shape[2] > 1,
        enable_gqa=num_groups > 1 and can_share,
    )


def _attend_in_groups(query_BA1D: Tensor, key_BAKD: Tensor, value_BAKD: Tensor, mask: Tensor | None) -> Tensor:
    """One new token: the query heads of a group stand as the places of a sequence, so that no key is read twice."""
    query_BAGD = query_BA1D.squeeze(2).unflatten(1, (key_BAKD.shape[1], -1))
    mixed_BAGD = F.scaled_dot_product_attention(query_BAGD, key_BAKD, value_BAKD, attn_mask=mask)
    return mixed_BAGD.flatten(1, 2).unsqueeze(2)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The bool mask as numbers to add to scores: made once a step, where attention would make it once a layer."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
