"""Keys and values of the tokens so far, so that generation computes each token once."""

from typing import Any

import torch
from torch import Tensor


class KVCache:
    """Room for `max_length` tokens a row in every layer; filled by the model, once a call."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self.token_mask_BS: Tensor | None = None
        self.router_memory: dict[int, Any] = {}
        """What routers keep of earlier tokens, by layer."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer_index: int, key_BASD: Tensor, value_BASD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens of one layer; returns keys and values of all tokens so far."""
        if layer_index not in self._layers:
            self._layers[layer_index] = (self._room(key_BASD), self._room(value_BASD))
        keys_BASD, values_BASD = self._layers[layer_index]
        end = self.length + key_BASD.shape[2]
        keys_BASD[:, :, self.length : end] = key_BASD
        values_BASD[:, :, self.length : end] = value_BASD
        return keys_BASD[:, :, :end], values_BASD[:, :, :end]

    def extended_mask(self, tokens_BS: Tensor, token_mask_BS: Tensor | None) -> Tensor | None:
        """Bool mask of the tokens so far followed by the new ones; None where none is masked."""
        if self.length == 0 or (token_mask_BS is None and self.token_mask_BS is None):
            return token_mask_BS
        past = tokens_BS.new_ones((tokens_BS.shape[0], self.length), dtype=torch.bool)
        new = torch.ones_like(tokens_BS, dtype=torch.bool)
        parts = (
            past if self.token_mask_BS is None else self.token_mask_BS,
            new if token_mask_BS is None else token_mask_BS,
        )
        return torch.cat(parts, dim=1)

    def advance(self, num_tokens: int, token_mask_BS: Tensor | None) -> None:
        """Count the new tokens as stored, once every layer has them; the mask is that of all tokens so far."""
        self.length += num_tokens
        self.token_mask_BS = token_mask_BS

    def _room(self, heads_BASD: Tensor) -> Tensor:
        batch_size, num_heads, _, head_size = heads_BASD.shape
        return heads_BASD.new_zeros((batch_size, num_heads, self.max_length, head_size))
