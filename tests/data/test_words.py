"""The word-level tokenizer: line ends count, unknown words share an id, and perplexity is per word."""

import math

import numpy as np
import pytest

from remoe.data import DataConfig, load_saved_tokenizer, load_tokenizer, open_corpus, validation_batches
from remoe.data.words import WordTokenizer
from remoe.errors import DataError

LINES = " = A title = \n the cat sat on the mat\n\n the <unk> ran\n"


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text(LINES)
    return load_tokenizer("words", [path])


def test_vocabulary_is_unknown_end_of_line_and_the_words_by_frequency(words):
    assert words.words[:6] == ["<unk>", "\n", "the", "=", "A", "cat"]
    assert words.vocab_size == words.eod + 1 == len(words.words) + 1


def test_every_line_ends_with_its_own_token_as_in_wikitext_counts(words):
    ids = words.encode("the cat\n\nthe\n")
    assert [words.token_text(i) for i in ids] == ["the", "cat", "\\n", "\\n", "the", "\\n"]
    assert ids.dtype == np.int32


def test_words_outside_the_vocabulary_and_the_texts_own_unk_are_unknown(words):
    assert words.encode("dog <unk> cat").tolist() == [0, 0, words.encode("cat")[0]]


def test_decoding_gives_the_text_back_but_for_spaces(words):
    assert words.decode([*words.encode(LINES), words.eod]) == "= A title =\nthe cat sat on the mat\n\nthe <unk> ran\n"


def test_saved_tokenizer_comes_back_the_same(words, tmp_path):
    words.save(tmp_path / "saved")
    again = load_saved_tokenizer(tmp_path / "saved")
    assert (again.name, again.fingerprint, again.eod) == ("words", words.fingerprint, words.eod)
    assert again.encode(LINES).tolist() == words.encode(LINES).tolist()
    assert WordTokenizer(["a"]).fingerprint != WordTokenizer(["b"]).fingerprint


def test_words_without_training_text_are_refused():
    with pytest.raises(DataError, match="'words' takes its vocabulary from training text"):
        load_tokenizer("words")


def test_wikitext_is_counted_as_the_literature_does(shared, tmp_path):
    test, valid = (shared / "wikitext" / f"wikitext2.{split}.txt" for split in ("test", "valid"))
    config = DataConfig(
        train=str(test), validation=str(valid), tokenizer="words", sequence_length=64, cache=tmp_path / "cache"
    )
    corpus = open_corpus(config)
    ends = corpus.train.num_documents + corpus.validation.num_documents  # of documents: ours, not WikiText's
    assert corpus.train.num_tokens + corpus.validation.num_tokens - ends == 245_569 + 217_646  # words and <eos>
    batch = next(iter(validation_batches(corpus.validation, 64, 4, 1)))
    assert int(batch.tokens_BS.max()) < corpus.tokenizer.vocab_size
    assert math.isfinite(float(batch.labels_BS.sum()))
