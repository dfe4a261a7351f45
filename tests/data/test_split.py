import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe.data import TokenDataset
from remoe.data.split import hold_out
from remoe.errors import DataError


def random_documents(count, seed=0, low=20, high=60):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 257, rng.integers(low, high)).tolist() for _ in range(count)]


def texts(dataset):
    return {tuple(dataset.document(i).tolist()) for i in range(dataset.num_documents)}


def test_the_share_held_out_is_about_the_fraction():
    dataset = TokenDataset.from_documents(random_documents(1000), 257)
    train, validation = hold_out(dataset, 0.1, minimum=17)
    assert 70 < validation.num_documents < 130
    assert train.num_documents + validation.num_documents == 1000


def test_a_document_stays_on_its_side_when_others_come_and_go():
    documents = random_documents(400)
    whole = hold_out(TokenDataset.from_documents(documents, 257), 0.1, 17)
    half = hold_out(TokenDataset.from_documents(documents[::-2], 257), 0.1, 17)
    assert texts(half[0]) <= texts(whole[0])
    assert texts(half[1]) <= texts(whole[1])


def test_equal_documents_are_never_on_both_sides():
    documents = random_documents(200) * 3
    train, validation = hold_out(TokenDataset.from_documents(documents, 257), 0.1, 17)
    assert not texts(train) & texts(validation)
    assert validation.num_documents % 3 == 0


def test_each_domain_with_several_documents_is_on_both_sides():
    domains = ["a"] * 3 + ["b"] * 2 + ["c"] * 30 + ["lone"]
    dataset = TokenDataset.from_documents(random_documents(len(domains)), 257, domains)
    for fraction in (0.001, 0.05, 0.999):
        train, validation = hold_out(dataset, fraction, 17)
        assert set(train.domain_of_document) == {0, 1, 2, 3}
        assert set(validation.domain_of_document) == {0, 1, 2}


def test_one_document_is_cut_at_its_end():
    train, validation = hold_out(TokenDataset.from_documents([list(range(200))], 257), 0.1, minimum=17)
    assert train.document(0).tolist() == list(range(180))
    assert validation.document(0).tolist() == list(range(180, 200))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(2, 20), st.floats(0.01, 0.9))
@settings(max_examples=150, deadline=None)
def test_both_sides_have_enough_tokens_and_share_none(lengths, minimum, fraction):
    ends = np.cumsum(lengths)
    documents = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    dataset = TokenDataset.from_documents(documents, 257)
    if dataset.num_tokens < 2 * minimum:
        with pytest.raises(DataError, match="held-out validation need one sequence"):
            hold_out(dataset, fraction, minimum)
        return
    parts = hold_out(dataset, fraction, minimum)
    assert all(part.num_tokens >= minimum for part in parts)
    tokens = [token for part in parts for i in range(part.num_documents) for token in part.document(i).tolist()]
    assert sorted(tokens) == list(range(dataset.num_tokens))
