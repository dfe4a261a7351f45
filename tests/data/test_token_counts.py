"""Facts about counting tokens."""

import numpy as np
import pytest

from remoe.data import token_counts as module
from remoe.data.dataset import BlendedDataset, TokenDataset
from remoe.data.token_counts import token_counts


def test_only_the_tokens_of_the_datasets_own_documents_count(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 2)
    dataset = TokenDataset.from_documents([[1, 1, 2], [3, 3, 3], [0, 1]], vocab_size=5)
    assert token_counts(dataset, 6).tolist() == [1, 3, 1, 3, 0, 0]
    assert token_counts(dataset.select(np.array([0, 2])), 5).tolist() == [1, 3, 1, 0, 0]


def test_a_blend_counts_by_weight_not_by_size():
    small = TokenDataset.from_documents([[0, 0]], vocab_size=2)
    large = TokenDataset.from_documents([[1] * 8], vocab_size=2)
    counts = token_counts(BlendedDataset([(small, 3.0), (large, 1.0)]), 2)
    assert counts.tolist() == pytest.approx([7.5, 2.5])
