import json
import logging

import numpy as np
import pytest

from remoe.data import Sampler, open_corpus, open_validation, validation_batches
from remoe.data.prepare import PrepareConfig, prepare
from remoe.data.tokenizer import BytesTokenizer
from remoe.errors import ConfigError, DataError

TEXTS = [f"Document {i} " + "talks of this and that. " * (3 + i % 5) for i in range(40)]
DOMAINS = ["news", "code"] * 20
QUIET = PrepareConfig(show_progress=False)


def decoded(corpus, dataset):
    return {corpus.tokenizer.decode(dataset.document(i)) for i in range(dataset.num_documents)}


def test_rows_become_documents_that_end_with_eod(write_rows, data_config):
    corpus = open_corpus(data_config(train=str(write_rows("a.jsonl", TEXTS, DOMAINS))))
    assert decoded(corpus, corpus.train) | decoded(corpus, corpus.validation) == set(TEXTS)
    assert all(corpus.train.document(i)[-1] == 256 for i in range(corpus.train.num_documents))
    assert corpus.train.domains == corpus.validation.domains == ("news", "code")
    assert set(corpus.validation.domain_of_document) == {0, 1}
    for i in range(corpus.train.num_documents):
        text = corpus.tokenizer.decode(corpus.train.document(i))
        assert corpus.train.domains[corpus.train.domain_of_document[i]] == DOMAINS[TEXTS.index(text)]


def test_held_out_text_is_the_same_each_time_and_in_no_training_document(write_rows, data_config):
    config = data_config(train=str(write_rows("a.jsonl", TEXTS)))
    first, second = open_corpus(config), open_validation(config)
    assert decoded(first, first.validation) == decoded(second, second.validation)
    assert not decoded(first, first.train) & decoded(first, first.validation)


def test_validation_text_opens_without_the_training_text(write_rows, data_config):
    valid = write_rows("v.jsonl", TEXTS[20:], DOMAINS)
    alone = open_validation(data_config(train="gone.jsonl", validation=str(valid)))
    assert decoded(alone, alone.validation) == set(TEXTS[20:])
    with pytest.raises(DataError, match=r"data\.train: gone\.jsonl does not exist"):
        open_validation(data_config(train="gone.jsonl", validation=str(valid), tokenizer="characters"))


def test_text_is_tokenised_once_and_again_only_when_something_changed(write_rows, data_config, monkeypatch):
    calls = []
    encode = BytesTokenizer.encode_batch
    monkeypatch.setattr(BytesTokenizer, "encode_batch", lambda self, texts: calls.append(1) or encode(self, texts))
    path = write_rows("a.jsonl", TEXTS, DOMAINS)
    open_corpus(data_config(train=str(path)))
    path.touch()
    open_corpus(data_config(train=str(path), sequence_length=32))
    path.rename(path.with_name("b.jsonl"))
    open_corpus(data_config(train=str(path.with_name("b.jsonl"))))
    assert len(calls) == 1
    open_corpus(data_config(train=str(path.with_name("b.jsonl")), domain_field="meta.pile_set_name"))
    path = write_rows("b.jsonl", [*TEXTS, "One more."])
    open_corpus(data_config(train=str(path)))
    assert len(calls) == 3


def test_a_damaged_cache_is_made_again(write_rows, data_config, tmp_path, caplog):
    config = data_config(train=str(write_rows("a.jsonl", TEXTS)))
    expected = decoded(*(lambda corpus: (corpus, corpus.train))(open_corpus(config)))
    (tokens,) = (tmp_path / "cache").rglob("*.bin")
    tokens.write_bytes(tokens.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        corpus = open_corpus(config)
    assert decoded(corpus, corpus.train) == expected
    assert "truncated" in caplog.text
    assert list((tmp_path / "cache" / "tokens").glob(".new-*")) == []


def test_validation_text_of_its_own_shares_the_list_of_domains(write_rows, data_config):
    train, valid = write_rows("t.jsonl", TEXTS[:20], DOMAINS), write_rows("v.jsonl", TEXTS[20:], ["law", *DOMAINS])
    corpus = open_corpus(data_config(train=str(train), validation=str(valid)))
    assert corpus.train.domains == corpus.validation.domains == ("news", "code", "law")
    assert decoded(corpus, corpus.validation) == set(TEXTS[20:])
    assert corpus.manifest["domains"]["law"]["train"] == 0


def test_the_same_text_for_training_and_validation_is_refused(write_rows, data_config, tmp_path):
    path = write_rows("a.jsonl", TEXTS)
    copy = write_rows("copy.jsonl", TEXTS)
    for validation in (path, copy):
        with pytest.raises(DataError, match=r"is the same text as data\.train"):
            open_corpus(data_config(train=str(path), validation=str(validation)))
    for name in "ab":
        prepare([path], "bytes", tmp_path / name, QUIET)
    with pytest.raises(DataError, match=r"is the same text as data\.train"):
        open_corpus(data_config(train=str(tmp_path / "a"), validation=str(tmp_path / "b")))


def test_a_list_with_weights_is_a_blend(write_rows, data_config):
    news, code = write_rows("news.jsonl", TEXTS[:20]), write_rows("code.jsonl", TEXTS[20:])
    entries = [{"path": str(news), "weight": 3}, {"path": str(code), "weight": 1}]
    corpus = open_corpus(data_config(train=entries))
    assert corpus.train.domains == ("news", "code")
    domains = [Sampler(corpus.train, 16, 4, 0).batch(step).domain_BS[:, 0].tolist() for step in range(5)]
    assert [row.count(0) for row in domains] == [3] * 5
    validation = next(iter(validation_batches(corpus.validation, 16, 4, 1)))
    assert set(validation.domain_BS.flatten().tolist()) == {0, 1}


def test_a_list_without_weights_counts_by_tokens(write_rows, data_config):
    paths = [write_rows("long.jsonl", TEXTS), write_rows("short.jsonl", TEXTS[:10])]
    corpus = open_corpus(data_config(train=[str(path) for path in paths]))
    weights = [weight for _, weight in corpus.train.sources]
    tokens = [dataset.num_tokens for dataset, _ in corpus.train.sources]
    assert weights == pytest.approx(np.array(tokens) / sum(tokens))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "x", "wieght": 1}, "unknown key 'wieght'; did you mean 'weight'"),
        ({"weight": 1}, "without a path"),
        ({"path": "x", "weight": 0}, "weight of x is 0, must be a number above 0"),
        ({"path": "x", "weight": "1"}, "must be a number above 0"),
    ],
)
def test_a_wrong_entry_of_a_blend_is_one_message(entry, message, data_config):
    with pytest.raises(ConfigError, match=message):
        open_corpus(data_config(train=[entry]))
    with pytest.raises(ConfigError, match="empty list"):
        open_corpus(data_config(train=[]))


def test_a_prepared_prefix_is_the_same_corpus_as_its_text(write_rows, data_config, tmp_path):
    path = write_rows("a.jsonl", TEXTS, DOMAINS)
    prepare([path], "bytes", tmp_path / "prepared.v1", QUIET)
    corpora = [open_corpus(data_config(train=str(name))) for name in (path, tmp_path / "prepared.v1")]
    corpora.append(open_corpus(data_config(train=str(tmp_path / "prepared.v1.bin"))))
    batches = [Sampler(corpus.train, 16, 8, 0).batch(3) for corpus in corpora]
    assert all((batch.tokens_BS == batches[0].tokens_BS).all() for batch in batches)
    assert all((batch.domain_BS == batches[0].domain_BS).all() for batch in batches)


def test_a_dataset_of_another_tokenizer_is_refused(write_rows, data_config, tmp_path):
    path = write_rows("a.jsonl", TEXTS)
    prepare([path], "characters", tmp_path / "prepared", QUIET)
    with pytest.raises(DataError, match=r"made with tokenizer 'characters' of .* data\.tokenizer is 'bytes' of 257"):
        open_corpus(data_config(train=str(tmp_path / "prepared")))
    corpus = open_corpus(data_config(train=str(tmp_path / "prepared"), tokenizer="characters"))
    assert decoded(corpus, corpus.train) <= set(TEXTS)
    named = open_corpus(data_config(train=str(tmp_path / "prepared"), tokenizer=str(tmp_path / "prepared.tokenizer")))
    assert named.tokenizer.fingerprint == corpus.tokenizer.fingerprint


def test_an_id_outside_the_vocabulary_of_a_bare_dataset_is_refused(write_rows, data_config, tmp_path):
    prepare([write_rows("a.jsonl", TEXTS)], "bytes", tmp_path / "bare", QUIET)
    for ending in ("domains", "manifest"):
        (tmp_path / f"bare.{ending}.json").unlink()
    assert open_corpus(data_config(train=str(tmp_path / "bare"))).train.domains == ("text",)
    tokens = np.memmap(tmp_path / "bare.bin", "<u2", "r+")
    tokens[-3] = 257
    tokens.flush()
    with pytest.raises(DataError, match="holds token id 257, must be below"):
        open_corpus(data_config(train=str(tmp_path / "bare")))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"domains": ["a"], "domain_of_document": [0]}, "the domains of 1 documents, the dataset has 40"),
        ({"domains": ["a"], "domain_of_document": [1] * 40}, "not one of its 1 names"),
        ({"domains": ["a"]}, "is damaged"),
        ([], "must hold a JSON object"),
    ],
)
def test_damaged_domains_are_refused(table, message, write_rows, data_config, tmp_path):
    prepare([write_rows("a.jsonl", TEXTS)], "bytes", tmp_path / "data", QUIET)
    (tmp_path / "data.domains.json").write_text(json.dumps(table))
    with pytest.raises(DataError, match=message):
        open_corpus(data_config(train=str(tmp_path / "data")))


def test_text_shorter_than_one_sequence_is_refused(write_rows, data_config):
    path = str(write_rows("short.jsonl", ["abc"]))
    with pytest.raises(DataError, match=r"short\.jsonl holds 4 tokens, must hold at least .* 17"):
        open_corpus(data_config(train=path))
    path = str(write_rows("short.jsonl", ["abcdefghijklmnopqrst"]))
    with pytest.raises(DataError, match=r"training and held-out validation need one sequence of .* 17 each"):
        open_corpus(data_config(train=path))
    valid = str(write_rows("valid.jsonl", ["x"]))
    with pytest.raises(DataError, match=r"valid\.jsonl holds 2 tokens"):
        open_corpus(data_config(train=path, validation=valid))


def test_bad_lines_refuse_by_default_and_write_nothing(write_rows, data_config, tmp_path):
    path = write_rows("a.jsonl", TEXTS)
    path.write_text(path.read_text() + "oops\n")
    with pytest.raises(DataError, match=r"a\.jsonl:41: not valid JSON"):
        open_corpus(data_config(train=str(path)))
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_skipped_lines_are_counted(write_rows, data_config, caplog):
    path = write_rows("a.jsonl", TEXTS)
    path.write_text(path.read_text() + "oops\n")
    with caplog.at_level(logging.WARNING):
        open_corpus(data_config(train=str(path), on_bad_line="skip"))
        open_corpus(data_config(train=str(path), on_bad_line="skip"))
    assert caplog.text.count("skipped 1 bad line, listed in") == 1


@pytest.mark.parametrize("tokenizer", ["bytes", "characters", "words"])
def test_the_text_may_have_another_key(tokenizer, write_rows, data_config):
    rows = write_rows("a.jsonl", TEXTS)
    other = rows.with_name("b.jsonl")
    other.write_text(rows.read_text().replace('"text":', '"content":'))
    with pytest.raises(DataError, match=r"b\.jsonl:1: has no key 'text'.*--set data\.text_field=content \(train\)$"):
        open_corpus(data_config(train=str(other), tokenizer=tokenizer))
    corpus = open_corpus(data_config(train=str(other), tokenizer=tokenizer, text_field="content"))
    assert (
        corpus.tokenizer.fingerprint
        == open_corpus(data_config(train=str(rows), tokenizer=tokenizer)).tokenizer.fingerprint
    )
    assert corpus.train.num_documents + corpus.validation.num_documents == len(TEXTS)


def test_missing_text_is_one_message(data_config, tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist, must be a text, jsonl or parquet file"):
        open_corpus(data_config(train=str(tmp_path / "nowhere")))


def test_characters_take_their_vocabulary_from_the_training_text(write_rows, data_config):
    corpus = open_corpus(
        data_config(train=str(write_rows("a.jsonl", ["abcd" * 20, "dcba" * 20])), tokenizer="characters")
    )
    assert corpus.tokenizer.vocab_size == 6


def test_the_cache_folder_may_not_be_a_file(write_rows, data_config, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(DataError, match=r"data\.cache is .*must be a folder to write to"):
        open_corpus(data_config(train=str(write_rows("a.jsonl", TEXTS))))


def test_real_text_of_nine_domains_opens_with_gpt2_tokens(shared, data_config):
    pytest.importorskip("tokenizers")
    pile = shared / "pile6"
    gpt2 = f"gpt2:{shared / 'tokenizers' / 'gpt2'}"
    config = data_config(
        train=str(pile / "validation.jsonl.xz"), validation=str(pile / "test.jsonl.xz"), tokenizer=gpt2
    )
    corpus = open_corpus(config)
    assert corpus.manifest["domains"]["DM Mathematics"] == {"train": 132_641 + 38, "validation": 63_780 + 17}
    assert corpus.train.num_tokens == 637_186 + 684


def test_weights_of_validation_texts_are_refused_not_ignored(write_rows, data_config):
    texts = [write_rows(f"{name}.jsonl", TEXTS[place::3]) for place, name in enumerate("abc")]
    entries = [{"path": str(path), "weight": 2} for path in texts[1:]]
    with pytest.raises(ConfigError, match=r"data\.validation gives .* a weight"):
        open_corpus(data_config(train=str(texts[0]), validation=entries))
