"""Where each token stands: its position, what it may attend to, which tokens start a sequence."""

from typing import NamedTuple

import torch
from torch import Tensor

from remoe.errors import ConfigError
from remoe.model.cache import KVCache


class Placement(NamedTuple):
    """The layout of one call's tokens; K counts the cached tokens as well, S only the new ones."""

    position_BS: Tensor
    """Index within the own sequence or document, from 0; B is 1 where all rows are alike."""
    sequence_start_BS: Tensor
    """Bool: first token of each sequence or document."""
    key_mask_BK: Tensor | None
    """Bool: tokens that count, cached ones first; None: all."""
    attention_mask: Tensor | None
    """Bool [B or 1, 1, S, K]: which keys a query sees; None: all up to itself."""
    token_mask_BS: Tensor | None
    """Bool: new tokens that count; None: all."""


def place_tokens(
    tokens_BS: Tensor, token_mask_BS: Tensor | None, document_BS: Tensor | None, cache: KVCache | None
) -> Placement:
    """Lay out a batch; raises ConfigError for inputs that do not fit together."""
    _check_inputs(tokens_BS, token_mask_BS, document_BS, cache)
    token_mask_BS = None if token_mask_BS is None else token_mask_BS.bool()
    key_mask_BK = token_mask_BS if cache is None else cache.extended_mask(tokens_BS, token_mask_BS)
    num_cached = 0 if cache is None else cache.length
    position_BS = _positions(tokens_BS, num_cached, key_mask_BK, document_BS)
    start_BS = position_BS == 0 if token_mask_BS is None else (position_BS == 0) & token_mask_BS
    return Placement(
        position_BS,
        start_BS.expand_as(tokens_BS),
        key_mask_BK,
        _attention_mask(tokens_BS, num_cached, key_mask_BK, document_BS),
        None if key_mask_BK is None else key_mask_BK[:, -tokens_BS.shape[1] :],
    )


def place_step(slot: Tensor, key_mask_BK: Tensor) -> Placement:
    """One new token a row at `slot` (int64 [1]) of K places, nothing of which the host has to know.

    `key_mask_BK` is true for tokens that count, the new ones included, and false at the places after them.
    """
    key_K = torch.arange(key_mask_BK.shape[1], device=slot.device)
    token_mask_B1 = key_mask_BK.index_select(1, slot)
    position_B1 = (key_mask_BK & (key_K < slot)).sum(1, keepdim=True)
    return Placement(
        position_B1,
        (position_B1 == 0) & token_mask_B1,
        key_mask_BK,
        (key_mask_BK | (key_K == slot))[:, None, None],  # a row that has stopped sees itself, as padding does
        token_mask_B1,
    )


def _check_inputs(
    tokens_BS: Tensor, token_mask_BS: Tensor | None, document_BS: Tensor | None, cache: KVCache | None
) -> None:
    if tokens_BS.dim() != 2 or tokens_BS.shape[1] == 0:
        raise ConfigError(
            f"tokens_BS has shape {list(tokens_BS.shape)}, must be [batch, sequence] with at least one token a row"
        )
    for name, tensor in (("token_mask_BS", token_mask_BS), ("document_BS", document_BS)):
        if tensor is not None and tensor.shape != tokens_BS.shape:
            raise ConfigError(
                f"{name} has shape {list(tensor.shape)}, must be that of tokens_BS: {list(tokens_BS.shape)}"
            )
    if cache is None:
        return
    if document_BS is not None:
        raise ConfigError("document_BS is given with a cache; a cached row is one document, must be None")
    if cache.length + tokens_BS.shape[1] > cache.max_length:
        raise ConfigError(
            f"the cache has room for {cache.max_length} tokens, must be at least {cache.length + tokens_BS.shape[1]}"
        )


def _positions(tokens_BS: Tensor, num_cached: int, key_mask_BK: Tensor | None, document_BS: Tensor | None) -> Tensor:
    num_new = tokens_BS.shape[1]
    if key_mask_BK is None and document_BS is None:
        return torch.arange(num_cached, num_cached + num_new, device=tokens_BS.device)[None]
    counts_BK = torch.ones_like(tokens_BS) if key_mask_BK is None else key_mask_BK.long()
    position_BK = counts_BK.cumsum(1) - counts_BK  # tokens before this one: padding takes no position
    if document_BS is None:
        return position_BK[:, -num_new:]
    first_BS = position_BK.masked_fill(~document_starts(document_BS), 0).cummax(1).values
    return position_BK - first_BS


def document_starts(document_BS: Tensor) -> Tensor:
    """Bool: tokens whose document is not that of the token before."""
    changes_BS = torch.ones_like(document_BS, dtype=torch.bool)
    changes_BS[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    return changes_BS


def _attention_mask(
    tokens_BS: Tensor, num_cached: int, key_mask_BK: Tensor | None, document_BS: Tensor | None
) -> Tensor | None:
    num_new = tokens_BS.shape[1]
    if key_mask_BK is None and document_BS is None and (num_cached == 0 or num_new == 1):
        return None
    key_K = torch.arange(num_cached + num_new, device=tokens_BS.device)
    query_S1 = key_K[num_cached:, None]
    allowed = (key_K <= query_S1)[None]
    if document_BS is not None:
        allowed = allowed & (document_BS[:, :, None] == document_BS[:, None, :])
    if key_mask_BK is not None:
        allowed = allowed & key_mask_BK[:, None, :]
    return (allowed | (key_K == query_S1))[:, None]  # a padding token sees itself: an empty row would be NaN
