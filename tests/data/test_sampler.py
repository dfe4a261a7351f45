import pickle
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe.data import BlendedDataset, Sampler, TokenDataset, validation_batches
from remoe.data.sampler import NO_LABEL, blend_pattern, shuffled
from remoe.errors import DataError

VOCABULARY = 100_000


def numbered(lengths, domains=None, first=0):
    """Documents whose tokens are all different, counted on from `first`."""
    ends = first + np.cumsum(lengths)
    documents = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    return TokenDataset.from_documents(documents, VOCABULARY, domains)


def tokens_of(sampler, steps):
    return torch.cat([sampler.batch(step).tokens_BS for step in steps])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_reads_each_token_once_and_gives_each_as_a_label_once(lengths, length, seed):
    dataset = numbered(lengths)
    samples = (dataset.num_tokens - 1) // length
    if samples < 1:
        with pytest.raises(DataError, match="must hold at least"):
            Sampler(dataset, length, 1, seed)
        return
    sampler = Sampler(dataset, length, 1, seed)
    for epoch in (0, 1):
        batches = [sampler.batch(epoch * samples + step) for step in range(samples)]
        for rows in ([batch.tokens_BS for batch in batches], [batch.labels_BS for batch in batches]):
            ids = torch.cat(rows).flatten()
            assert len(ids.unique()) == len(ids) == samples * length
            assert dataset.num_tokens - len(ids) <= length  # only a last piece is left for another epoch


def test_labels_are_the_next_tokens_of_the_shuffled_documents():
    sampler = Sampler(numbered([10] * 20), 7, 4, seed=3)
    for step in range(5):
        batch = sampler.batch(step)
        assert torch.equal(batch.tokens_BS[:, 1:], batch.labels_BS[:, :-1])
        stays = batch.document_BS[:, 1:] == batch.document_BS[:, :-1]
        follows = batch.tokens_BS[:, 1:] == batch.tokens_BS[:, :-1] + 1
        assert torch.equal(stays, follows)  # no two documents happened to keep their order


def test_documents_and_domains_are_marked():
    dataset = numbered([3, 50, 4, 2], ["a", "b", "a", "c"])
    batch = Sampler(dataset, 29, 2, seed=0).batch(0)
    document_of_token = np.repeat(np.arange(4), [3, 50, 4, 2])
    for tokens, labels, documents, domains in zip(*batch, strict=True):
        true_documents = document_of_token[tokens]
        assert np.array_equal(np.diff(documents) != 0, np.diff(true_documents) != 0)
        assert np.array_equal(domains, dataset.domain_of_document[document_of_token[labels]])
    assert {tensor.dtype for tensor in batch} == {torch.int64}


def test_a_batch_depends_on_seed_and_step_only():
    dataset = numbered(range(60))
    sequential, random = Sampler(dataset, 8, 6, seed=1), Sampler(dataset, 8, 6, seed=1)
    expected = [sequential.batch(step) for step in range(100)]
    for step in (99, 3, 57, 0):
        assert all(torch.equal(a, b) for a, b in zip(random.batch(step), expected[step], strict=True))
    assert not torch.equal(Sampler(dataset, 8, 6, seed=2).batch(0).tokens_BS, expected[0].tokens_BS)
    Sampler(dataset, 8, 6, seed=-1).batch(0)


def test_micro_batches_are_rows_of_the_batch():
    sampler = Sampler(numbered(range(60)), 8, 6, seed=1)
    whole = sampler.batch(5)
    pieces = [sampler.batch(5, rows=slice(row, row + 2)) for row in (0, 2, 4)]
    for place, tensor in enumerate(whole):
        assert torch.equal(torch.cat([piece[place] for piece in pieces]), tensor)


def test_batch_size_does_not_change_the_order_of_samples():
    dataset = numbered(range(60))
    small, large = Sampler(dataset, 8, 2, seed=1), Sampler(dataset, 8, 8, seed=1)
    assert torch.equal(tokens_of(small, range(8)), tokens_of(large, range(2)))


def test_a_shuffle_is_the_same_everywhere():
    assert shuffled(10, (0, 0, 0, 0)).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]


def blend_of(weights, length=2000):
    sources = [numbered([length], [f"source {i}"], first=i * length) for i in range(len(weights))]
    names = [f"source {i}" for i in range(len(weights))]
    return BlendedDataset([(s.with_domains(names), weight) for s, weight in zip(sources, weights, strict=True)])


def test_a_blend_follows_its_weights_at_every_point():
    sampler = Sampler(blend_of([5, 3, 2]), 10, 10, seed=0)
    domains = torch.cat([sampler.batch(step).domain_BS[:, 0] for step in range(200)])
    counts = torch.stack([(domains == i).cumsum(0) for i in range(3)], dim=1)
    wanted = torch.arange(1, 2001)[:, None] * torch.tensor([0.5, 0.3, 0.2])
    assert (counts - wanted).abs().max() <= 1.5


def test_each_source_of_a_blend_goes_through_its_own_epochs():
    dataset = blend_of([3, 1], length=101)
    sampler = Sampler(dataset, 10, 4, seed=0)
    tokens = tokens_of(sampler, range(10))  # 30 samples of the first, 10 of the second: 3 epochs and 1
    counts = torch.bincount(tokens.flatten(), minlength=202)
    assert counts[101:].sum() == 100
    assert counts[101:].max() == 1
    assert counts[:101].sum() == 300
    assert counts[:101].max() == 3


@pytest.mark.parametrize("weights", [[1], [1, 1, 1], [1e-9, 1], [0.1, 0.2, 0.7], [1] * 7])
def test_a_blend_pattern_has_a_place_for_each_source(weights):
    pattern = blend_pattern(weights)
    assert pattern.counts.min() >= 1
    assert np.array_equal(np.bincount(pattern.source), pattern.counts)
    for source in range(len(weights)):
        assert np.array_equal(pattern.rank[pattern.source == source], np.arange(pattern.counts[source]))


def test_validation_sees_every_domain_in_turn_and_no_token_twice():
    dataset = numbered([100, 40, 40, 7], ["a", "b", "a", "c"])
    batches = list(validation_batches(dataset, 10, 3, num_batches=3))
    assert [batch.domain_BS[:, 0].tolist() for batch in batches] == [[0, 1, 2], [0, 1, 0], [1, 0, 0]]
    tokens = torch.cat([batch.labels_BS for batch in batches]).flatten()
    tokens = tokens[tokens != NO_LABEL]
    assert len(tokens.unique()) == len(tokens)
    again = list(validation_batches(dataset, 10, 3, num_batches=3))
    assert all(torch.equal(a, b) for x, y in zip(batches, again, strict=True) for a, b in zip(x, y, strict=True))


def test_few_validation_batches_still_see_every_domain():
    dataset = numbered([30] * 5, list("abcde"))
    domains = [batch.domain_BS[:, 0].tolist() for batch in validation_batches(dataset, 8, 2, num_batches=1)]
    assert domains == [[0, 1], [2, 3], [4]]


def test_a_short_domain_is_filled_up_without_labels():
    (batch,) = validation_batches(numbered([5]), 8, 4, num_batches=1)
    assert batch.labels_BS.tolist() == [[1, 2, 3, 4] + [NO_LABEL] * 4]
    assert batch.tokens_BS[0, :5].tolist() == [0, 1, 2, 3, 4]
    assert batch.document_BS.tolist() == [[0] * 5 + [-1] * 3]


def test_validation_of_a_blend_covers_its_sources():
    batches = list(validation_batches(blend_of([9, 1]), 10, 4, num_batches=2))
    assert [batch.domain_BS[:, 0].tolist() for batch in batches] == [[0, 1, 0, 1]] * 2


def test_an_id_outside_the_vocabulary_is_refused_where_it_is_read():
    dataset = TokenDataset.from_documents([[1, 2, 300, 4]], vocab_size=257)
    with pytest.raises(DataError, match="holds token id 300, must be below the tokenizer's vocabulary of 257"):
        dataset.check_all_ids()
    with pytest.raises(DataError, match="token id 300"):
        Sampler(dataset, 3, 1, seed=0).batch(0)


def test_a_mapped_dataset_travels_to_another_process_without_its_tokens(tmp_path):
    tokens = np.memmap(tmp_path / "tokens", "<u2", "w+", shape=(100_000,))
    tokens[:] = np.arange(100_000) % 251
    tokens.flush()
    small = numbered([60, 40])
    mapped = TokenDataset(np.memmap(tmp_path / "tokens", "<u2", "r"), small._documents, ["text"], 257)
    packed = pickle.dumps(mapped)
    assert len(packed) < 5000
    assert np.array_equal(pickle.loads(packed).document(1), mapped.document(1))


def test_a_sequence_takes_well_under_a_millisecond():
    rng = np.random.default_rng(0)
    dataset = TokenDataset.from_documents([rng.integers(0, 257, 30) for _ in range(20_000)], 257)
    sampler = Sampler(dataset, 1024, 16, seed=0)
    sampler.batch(0)
    seconds = []
    for step in range(1, 11):
        start = time.perf_counter()
        sampler.batch(step)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) / 16 < 1e-3
