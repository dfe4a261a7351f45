"""Facts about attention."""

import pytest
import torch

from remoe.model.attention import attend


def heads(num_heads: int, seed: int, length: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, num_heads, length, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(query, key, value, mask):
    groups = query.shape[1] // key.shape[1]
    out = torch.empty_like(query)
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // groups].transpose(1, 2) / 8**0.5
        out[:, head] = scores.masked_fill(~mask[:, 0], -torch.inf).softmax(-1) @ value[:, head // groups]
    return out


CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_neighbouring_query_heads_share_a_key_value_head(kv_heads):
    query, key, value = heads(4, 0), heads(kv_heads, 1), heads(kv_heads, 2)
    expected = by_hand(query, key, value, CAUSAL)
    torch.testing.assert_close(attend(query, key, value, None), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attend(query, key, value, CAUSAL), expected, rtol=1e-5, atol=1e-6)


def test_bf16_heads_are_shared_by_the_kernel_with_the_same_result():
    query, key, value = (heads(n, seed, dtype=torch.bfloat16) for seed, n in enumerate((4, 2, 2)))
    expected = by_hand(query.float(), key.float(), value.float(), CAUSAL)
    torch.testing.assert_close(attend(query, key, value, None).float(), expected, rtol=0, atol=2e-2)


def test_one_new_query_sees_every_key():
    query, key, value = heads(4, 0, length=1), heads(2, 1), heads(2, 2)
    everything = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    expected = by_hand(query, key, value, everything)
    torch.testing.assert_close(attend(query, key, value, None), expected, rtol=1e-5, atol=1e-6)
