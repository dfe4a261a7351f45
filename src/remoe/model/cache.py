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
        """What routers keep of earlier tokens, by layer: a NamedTuple of tensors each."""
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        """Buffers of keys and values [B, A, max_length, D], by layer."""

    def update(self, layer_index: int, key_BASD: Tensor, value_BASD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens of one layer; returns keys and values of all tokens so far."""
        if layer_index not in self.layers:
            self.layers[layer_index] = (self._room(key_BASD), self._room(value_BASD))
        keys_BASD, values_BASD = self.layers[layer_index]
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

    def clear(self) -> None:
        """Forget all tokens; the buffers stay where they are."""
        self.length, self.token_mask_BS, self.router_memory = 0, None, {}
        for buffer in (buffer for pair in self.layers.values() for buffer in pair):
            buffer.zero_()  # a masked key that is not finite would still spoil its row

    def _room(self, heads_BASD: Tensor) -> Tensor:
        batch_size, num_heads, _, head_size = heads_BASD.shape
        return heads_BASD.new_zeros((batch_size, num_heads, self.max_length, head_size))


class CacheWindow:
    """The first `window` places of a cache while each row gets one more token, at a place that a tensor names.

    Shapes and addresses are the same for all places in the window, so a CUDA graph can hold the step.
    """

    def __init__(self, cache: KVCache, slot: Tensor, window: int, router_memory: dict[int, Any]) -> None:
        self.slot = slot
        """int64 [1]: the new token's place."""
        self.window = window
        self.router_memory = router_memory
        self._layers = cache.layers

    @property
    def dtype(self) -> torch.dtype:
        """What attention computes in."""
        return next(iter(self._layers.values()))[0].dtype

    def update(self, layer_index: int, key_BASD: Tensor, value_BASD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new token of one layer; returns keys and values of the whole window, zeros or old ones included."""
        keys_BASD, values_BASD = self._layers[layer_index]
        keys_BASD.index_copy_(2, self.slot, key_BASD)
        values_BASD.index_copy_(2, self.slot, value_BASD)
        return keys_BASD[:, :, : self.window], values_BASD[:, :, : self.window]


AnyCache = KVCache | CacheWindow
