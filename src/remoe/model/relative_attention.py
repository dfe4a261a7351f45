"""Attention over the last `attention_span` tokens with learned relative position keys (RMoE §2.7(b))."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remoe.model.cache import AnyCache
from remoe.model.config import ReMoEConfig
from remoe.model.linear import Linear
from remoe.model.placement import Placement
from remoe.moe.experts import in_compute_dtype
from remoe.moe.initial import Initial, Normal, Uniform


class RelativeInputs(NamedTuple):
    """What every layer's attention shares in one call. W = attention_span; slot w stands W - w tokens back."""

    position_keys_DW: Tensor
    mask: Tensor | None
    """Bool [B or 1, 1, S, W]: slots that hold a token of the own text; None: all that exist."""
    cache: AnyCache | None


class RelativePositions(nn.Module):
    """One learned key for each distance, shared by all layers and heads: `keys` [D, W]."""

    def __init__(self, config: ReMoEConfig) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(config.head_width, config.attention_span))

    def initial_values(self) -> Mapping[str, Initial]:
        """N(0, 1), as in the base."""
        return {"keys": Normal(1.0)}

    def forward(self, placement: Placement, cache: AnyCache | None) -> RelativeInputs:
        """The keys, and which slots each token may attend to."""
        mask = placement.attention_mask
        return RelativeInputs(self.keys, None if mask is None else unskew(span_before(mask, self.keys.shape[1])), cache)


class RelativeAttention(nn.Module):
    """Each token attends to exactly W slots, the W tokens before it and never itself.

    A slot before the start of the text has a key and value of 0 and still takes its share of the softmax through its
    position key, as the base's empty cache does; so the first token attends to nothing and the layer adds 0.
    """

    def __init__(self, config: ReMoEConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_size = config.head_width
        self.dropout = config.dropout
        size = config.num_heads * self.head_size
        self.q_proj = Linear(config.hidden_size, size)
        self.k_proj = Linear(config.hidden_size, size)
        self.v_proj = Linear(config.hidden_size, size)
        self.o_proj = Linear(size, config.hidden_size)

    def initial_values(self) -> Mapping[str, Initial]:
        """torch's own for linear maps, as in the base."""
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        return {f"{name}.weight": Uniform(getattr(self, name).in_features ** -0.5) for name in names}

    def forward(self, hidden_BSH: Tensor, inputs: RelativeInputs) -> Tensor:
        """Attend within the batch and, with a cache, to the tokens before it."""
        hidden_BSH = in_compute_dtype(hidden_BSH)
        query_BASD, key_BASD, value_BASD = (
            projection(hidden_BSH).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if inputs.cache is not None:
            key_BASD, value_BASD = inputs.cache.update(self.layer_index, key_BASD, value_BASD)
        mixed_BASD = self._attend(query_BASD, key_BASD, value_BASD, inputs)
        return self.o_proj(mixed_BASD.transpose(1, 2).flatten(2))

    def _attend(self, query_BASD: Tensor, key_BAKD: Tensor, value_BAKD: Tensor, inputs: RelativeInputs) -> Tensor:
        """Keys and values are those of all K tokens so far, the last S of them the queries' own."""
        num_new, span = query_BASD.shape[2], inputs.position_keys_DW.shape[1]
        query_BASD = query_BASD / math.sqrt(self.head_size)
        key_BAMD, value_BAMD = (_slots(heads, num_new, span) for heads in (key_BAKD, value_BAKD))
        content_BASW = unskew(query_BASD @ key_BAMD.transpose(2, 3))
        if inputs.mask is not None:
            content_BASW = content_BASW.masked_fill(~inputs.mask, 0)
        position_BASW = query_BASD @ inputs.position_keys_DW.to(query_BASD.dtype)
        share_BASW = (content_BASW + position_BASW).softmax(dim=-1, dtype=_softmax_dtype(query_BASD))
        if inputs.mask is not None:
            share_BASW = share_BASW.masked_fill(~inputs.mask, 0)
        share_BASW = F.dropout(share_BASW, self.dropout, self.training)
        return skew(share_BASW).to(value_BAMD.dtype) @ value_BAMD


def _slots(heads_BAKD: Tensor, num_new: int, span: int) -> Tensor:
    """The M = W + S - 1 tokens that fill the S queries' slots, zeros where the text had not begun."""
    return F.pad(heads_BAKD, (0, 0, span, 0))[:, :, -(span + num_new) : -1]


def span_before(mask: Tensor, span: int) -> Tensor:
    """A mask over K tokens [.., S, K] over the M tokens of the S queries' slots instead, false before the text."""
    return F.pad(mask, (span, 0))[..., -(span + mask.shape[-2]) : -1]


def unskew(scores: Tensor) -> Tensor:
    """[.., S, W + S - 1] to [.., S, W]: row i keeps columns i to i + W - 1."""
    num_rows, num_columns = scores.shape[-2:]
    flat = F.pad(scores.flatten(-2), (0, num_rows))
    return flat.unflatten(-1, (num_rows, num_columns + 1))[..., : num_columns + 1 - num_rows]


def skew(shares: Tensor) -> Tensor:
    """The way back, [.., S, W] to [.., S, W + S - 1] with zeros elsewhere."""
    num_rows, span = shares.shape[-2:]
    flat = F.pad(shares, (0, num_rows)).flatten(-2)
    return flat[..., : flat.shape[-1] - num_rows].unflatten(-1, (num_rows, span + num_rows - 1))


def _softmax_dtype(query_BASD: Tensor) -> torch.dtype:
    return torch.promote_types(query_BASD.dtype, torch.float32)
