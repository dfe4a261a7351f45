"""Counting: exact integers, whatever the batches; padding and dense layers never count."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from remoe.analysis.collect import collect
from remoe.data import Batch
from remoe.moe import Routing

# one row per token; experts as columns
MAP_OF_LAYER_1 = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1]], dtype=torch.bool)
MAP_OF_LAYER_3 = torch.tensor([[0, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)


class LookUpModel(torch.nn.Module):
    """Routes by the token's id, in layers 1 and 3 of four; layers 0 and 2 are dense."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(vocab_size=4, moe=SimpleNamespace(routed_top_k=1))
        self.documents = []

    def forward(self, tokens_BS, *, document_BS=None):
        self.documents.append(document_BS)
        ids_T = tokens_BS.flatten()
        routings = [self._routing(table[ids_T]) for table in (MAP_OF_LAYER_1, MAP_OF_LAYER_3)]
        return SimpleNamespace(routings=(None, routings[0], None, routings[1]))

    def _routing(self, map_TE):
        return Routing(map_TE.float(), map_TE)


def batch_of(tokens, domains, labels=None):
    tokens_BS = torch.tensor(tokens)
    labels_BS = torch.zeros_like(tokens_BS) if labels is None else torch.tensor(labels)
    return Batch(tokens_BS, labels_BS, torch.zeros_like(tokens_BS), torch.tensor(domains))


def test_counts_are_those_of_the_routing_maps_by_layer_domain_and_expert():
    counts = collect(LookUpModel(), [batch_of([[0, 1], [1, 3]], [[0, 0], [1, 1]])], ("code", "prose"))
    assert counts.layers == (1, 3)
    assert counts.tokens_D.tolist() == [2, 2]
    assert counts.load_LDE.tolist() == [[[2, 1, 0], [1, 1, 1]], [[0, 0, 2], [0, 1, 1]]]
    assert counts.load_LE.tolist() == [[0.75, 0.5, 0.25], [0.0, 0.25, 0.75]]


def test_tokens_are_counted_by_how_many_experts_they_used():
    counts = collect(LookUpModel(), [batch_of([[0, 1, 2, 3]], [[0, 0, 0, 0]])], ("text",))
    assert counts.tokens_by_active_LA.tolist() == [[1, 2, 1, 0], [0, 3, 0, 1]]


def test_each_vocabulary_entry_has_its_occurrences_active_experts_and_experts():
    counts = collect(LookUpModel(), [batch_of([[1, 1, 2]], [[0, 0, 0]])], ("text",))
    assert counts.token_ids_U.tolist() == [1, 2]
    assert counts.occurrences_U.tolist() == [2, 1]
    assert counts.active_U.tolist() == [2 * (2 + 1), 0 + 3]
    assert counts.token_layers == (0, 1)
    assert counts.token_load_NEU.tolist() == [[[2, 0], [2, 0], [0, 0]], [[0, 1], [0, 1], [2, 1]]]


def test_tokens_without_a_label_do_not_count():
    labels = [[0, -100, -100]]
    counts = collect(LookUpModel(), [batch_of([[0, 1, 1]], [[0, 0, 0]], labels)], ("text",))
    assert counts.num_tokens == 1
    assert counts.occurrences_U.tolist() == [1]
    assert counts.load_LDE.sum() == 2


@pytest.mark.parametrize("sizes", [[6], [1, 5], [2, 2, 2]])
def test_how_text_is_cut_into_batches_changes_nothing(sizes):
    tokens = torch.tensor([0, 1, 2, 3, 1, 0]).split(sizes)
    domains = torch.tensor([0, 1, 0, 1, 1, 0]).split(sizes)
    batches = [batch_of([t.tolist()], [d.tolist()]) for t, d in zip(tokens, domains, strict=True)]
    counts = collect(LookUpModel(), batches, ("a", "b"))
    assert counts.load_LDE.tolist() == [[[2, 0, 0], [2, 2, 1]], [[1, 1, 3], [0, 1, 2]]]
    assert counts.occurrences_U.tolist() == [2, 2, 1, 1]


def test_only_the_middle_layer_keeps_token_counts_when_all_would_be_many(monkeypatch):
    monkeypatch.setattr("remoe.analysis.collect.TOKEN_LOADS_LIMIT", 10)
    counts = collect(LookUpModel(), [batch_of([[1, 1, 2]], [[0, 0, 0]])], ("text",))
    assert counts.token_layers == (1,)
    assert counts.token_load_NEU.tolist() == [[[0, 1], [0, 1], [2, 1]]]


def test_documents_are_told_apart_only_where_the_run_was_trained_so():
    model, batch = LookUpModel(), batch_of([[0, 1]], [[0, 0]])
    collect(model, [batch], ("text",))
    collect(model, [batch], ("text",), document_mask=True)
    assert model.documents[0] is None
    assert torch.equal(model.documents[1], batch.document_BS)


def test_counts_are_whole_numbers():
    counts = collect(LookUpModel(), [batch_of([[0, 1, 2, 3]], [[0, 0, 0, 0]])], ("text",))
    assert {counts.load_LDE.dtype, counts.active_U.dtype, counts.tokens_D.dtype} == {np.dtype(np.int64)}
