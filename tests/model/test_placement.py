"""Facts about positions, sequence starts and attention masks."""

import pytest
import torch

from remoe.errors import ConfigError
from remoe.model import KVCache
from remoe.model.placement import place_tokens

TOKENS = torch.zeros(2, 4, dtype=torch.int64)


def test_plain_rows_need_no_mask_and_start_at_their_first_token():
    placement = place_tokens(TOKENS, None, None, None)
    assert placement.attention_mask is None
    assert placement.key_mask_BK is None
    assert placement.position_BS.tolist() == [[0, 1, 2, 3]]
    assert placement.sequence_start_BS.tolist() == [[True, False, False, False]] * 2


def test_left_padding_takes_no_position_and_starts_no_sequence():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    placement = place_tokens(TOKENS, mask, None, None)
    assert placement.position_BS.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert placement.sequence_start_BS.tolist() == [[False, False, True, False], [True, False, False, False]]


def test_a_padded_query_sees_itself_only_and_is_seen_by_nobody_else():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    attention_mask = place_tokens(TOKENS, mask, None, None).attention_mask
    assert attention_mask is not None
    assert attention_mask[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]


def test_positions_begin_anew_in_each_document():
    documents = torch.tensor([[5, 5, 2, 2], [9, 8, 8, 9]])
    placement = place_tokens(TOKENS, None, documents, None)
    assert placement.position_BS.tolist() == [[0, 1, 0, 1], [0, 0, 1, 0]]
    assert placement.sequence_start_BS.tolist() == [[True, False, True, False], [True, True, False, True]]


def test_the_document_mask_is_block_diagonal_and_causal():
    documents = torch.tensor([[5, 5, 2, 2], [1, 1, 1, 1]])
    attention_mask = place_tokens(TOKENS, None, documents, None).attention_mask
    assert attention_mask is not None
    assert attention_mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_padding_inside_a_document_takes_no_position():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 1]])
    documents = torch.tensor([[0, 0, 0, 7], [3, 3, 3, 3]])
    placement = place_tokens(TOKENS, mask, documents, None)
    assert placement.position_BS.tolist() == [[0, 0, 1, 0], [0, 1, 2, 2]]


def test_cached_tokens_come_before_the_new_ones():
    cache = KVCache(8)
    cache.advance(3, torch.tensor([[False, True, True], [True, True, True]]))
    placement = place_tokens(TOKENS, None, None, cache)
    assert placement.position_BS.tolist() == [[2, 3, 4, 5], [3, 4, 5, 6]]
    assert not placement.sequence_start_BS.any()
    assert placement.attention_mask is not None
    assert placement.attention_mask.shape == (2, 1, 4, 7)
    assert placement.attention_mask[0, 0, 0].int().tolist() == [0, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((TOKENS[0], None, None, None), r"tokens_BS has shape \[4\]"),
        ((TOKENS[:, :0], None, None, None), "at least one token"),
        ((TOKENS, TOKENS[:1], None, None), "token_mask_BS has shape"),
        ((TOKENS, None, TOKENS[:, :3], None), "document_BS has shape"),
        ((TOKENS, None, TOKENS, KVCache(9)), "document_BS is given with a cache"),
        ((TOKENS, None, None, KVCache(3)), "room for 3 tokens, must be at least 4"),
    ],
)
def test_inputs_that_do_not_fit_are_named(inputs, message):
    with pytest.raises(ConfigError, match=message):
        place_tokens(*inputs)
