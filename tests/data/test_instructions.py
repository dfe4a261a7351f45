"""Conversations as rows: whole, padded, with labels on answers only, in an order that the seed decides."""

import json

import numpy as np
import pytest
import torch

from remoe.config import from_dict
from remoe.data import DataConfig, Sampler, open_corpus, validation_batches
from remoe.data.instructions import packed
from remoe.data.sampler import NO_LABEL, NO_TOKEN
from remoe.errors import ConfigError, DataError

EOD = 256


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"q{number}?" + "x" * (number % 5), "response": f"a{number}."} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config_of(path, **keys):
    values = {"train": str(path), "format": "instructions", "template": "plain", "sequence_length": 32}
    return from_dict(DataConfig, values | keys)


def text_of(ids):
    return bytes(i for i in ids.tolist() if 0 <= i < EOD).decode()


def batches(path, seed=0, batch_size=4, steps=3, **keys):
    corpus = open_corpus(config_of(path, **keys))
    sampler = Sampler(corpus.train, 32, batch_size, seed)
    return corpus, [sampler.batch(step) for step in range(steps)]


def test_a_row_is_one_conversation_with_labels_on_its_answer_only(questions):
    _, (batch, *_) = batches(questions)
    for tokens, labels, documents in zip(batch.tokens_BS, batch.labels_BS, batch.document_BS, strict=True):
        text = text_of(tokens[documents != NO_TOKEN])
        number = text[1 : text.index("?")]
        assert text.startswith(f"q{number}?")
        answer = labels[labels != NO_LABEL]
        assert answer[-1] == EOD
        assert text_of(answer) == f"a{number}."
        first = int((labels != NO_LABEL).nonzero()[0])
        assert text_of(tokens[: first + 1]) == text.partition("a")[0]  # the question is read, not learned
        assert (tokens[documents == NO_TOKEN] == 0).all()


def test_an_epoch_reads_every_conversation_once_each_epoch_in_another_order(questions):
    corpus, _ = batches(questions, steps=0)
    count = corpus.train.num_documents
    sampler = Sampler(corpus.train, 32, 1, seed=1)
    epochs = [
        [text_of(sampler.batch(epoch * count + place).tokens_BS[0]) for place in range(count)] for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == count
    assert epochs[0] != epochs[1]


def test_a_batch_depends_on_seed_and_step_only(questions):
    corpus, expected = batches(questions, seed=3, steps=30)
    again = Sampler(corpus.train, 32, 4, seed=3)
    for step in (29, 0, 11):
        assert all(torch.equal(a, b) for a, b in zip(again.batch(step), expected[step], strict=True))
    other = Sampler(corpus.train, 32, 4, seed=4).batch(0)
    assert not torch.equal(other.tokens_BS, expected[0].tokens_BS)


def test_packed_rows_hold_whole_conversations_and_none_answers_for_its_neighbour(questions):
    corpus, (batch, *_) = batches(questions, packing=True, document_mask=True)
    assert int(batch.document_BS.max()) >= 1
    for tokens, labels, documents in zip(batch.tokens_BS, batch.labels_BS, batch.document_BS, strict=True):
        for document in range(int(documents.max()) + 1):
            text = text_of(tokens[documents == document])
            own = labels[documents == document]
            assert text.startswith("q")
            number = text[1 : text.index("?")]
            assert text_of(own[own != NO_LABEL]) == f"a{number}."
    assert sum(len(row) for row in corpus.train.sample_order(32, (0,)).rows) == corpus.train.num_documents


def test_rows_are_filled_as_far_as_whole_conversations_go():
    order, lengths = np.arange(6), np.array([4, 4, 4, 9, 1, 10])
    assert [row.tolist() for row in packed(order, lengths, 10)] == [[0, 1], [2], [3, 4], [5]]


def test_held_out_conversations_are_the_same_for_every_seed_and_none_is_trained_on(questions):
    corpus, _ = batches(questions, steps=0, validation_fraction=0.2)
    held = [text_of(row) for batch in validation_batches(corpus.validation, 32, 4, 10) for row in batch.tokens_BS]
    trained = {text_of(corpus.train.document(index)) for index in range(corpus.train.num_documents)}
    assert len(held) == corpus.validation.num_documents
    assert trained.isdisjoint(held)
    assert len(trained) + len(held) == 40


def test_validation_batches_have_labels_on_answers_and_padding_marked(questions):
    corpus, _ = batches(questions, steps=0)
    (batch, *_) = validation_batches(corpus.validation, 32, 4, 1)
    assert ((batch.labels_BS != NO_LABEL).sum(1) > 0).all()
    assert (batch.document_BS == NO_TOKEN).any()


def test_several_files_are_blended_by_weight(questions, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"instruction": f"i{n}", "output": f"o{n}"} for n in range(20)]), encoding="utf-8")
    corpus = open_corpus(config_of(questions, train=[{"path": str(questions)}, {"path": str(other)}]))
    assert set(corpus.train.domains) == {"questions", "other"}
    batch = Sampler(corpus.train, 32, 16, 0).batch(0)
    assert len(batch.domain_BS.unique()) == 2


def test_a_conversation_longer_than_a_row_is_cut_and_without_an_answer_left_out(questions):
    with questions.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "long" * 50, "response": "never seen"}) + "\n")
        file.write(json.dumps({"prompt": "cut", "response": "y" * 90}) + "\n")
    corpus, _ = batches(questions, steps=0, validation=None)
    parts = (corpus.train, corpus.validation)
    texts = [text_of(part.document(index)) for part in parts for index in range(part.num_documents)]
    assert len(texts) == 41
    assert not any("never" in text for text in texts)
    rows = [batch for part in parts for batch in validation_batches(part, 32, 64, 1)]
    assert any(text_of(row).startswith("cuty") for batch in rows for row in batch.tokens_BS)


def test_what_is_wrong_with_a_file_is_named_with_its_line(questions, tmp_path):
    with questions.open("a", encoding="utf-8") as file:
        file.write('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"questions\.jsonl:41: must have instruction and output"):
        open_corpus(config_of(questions))
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(DataError, match="too few to hold some out"):
        open_corpus(config_of(tmp_path / "one.jsonl"))
    (tmp_path / "broken.jsonl").write_text("\n{\n")
    with pytest.raises(DataError, match=r"broken\.jsonl:2: not valid JSON"):
        open_corpus(config_of(tmp_path / "broken.jsonl"))
    with pytest.raises(DataError, match="holds no conversation whose answer begins within"):
        open_corpus(config_of(questions, train=str(tmp_path / "one.jsonl"), sequence_length=2, template="alpaca"))
    with pytest.raises(DataError, match=r"but tokens\.bin is text"):
        open_corpus(config_of("tokens.bin"))


def test_packing_needs_the_mask_that_keeps_conversations_apart(questions):
    with pytest.raises(ConfigError, match=r"data\.packing is true, needs .*document_mask: true"):
        config_of(questions, packing=True)
    with pytest.raises(ConfigError, match=r"data\.packing is true, needs data\.format: instructions"):
        config_of(questions, packing=True, document_mask=True, format="text")
