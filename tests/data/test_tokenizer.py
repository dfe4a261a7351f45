import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe.data import load_saved_tokenizer, load_tokenizer
from remoe.data.tokenizer import BytesTokenizer, CharacterTokenizer, check_vocabulary
from remoe.errors import ConfigError, DataError, MissingExtraError

TEXT = "Grüße, 世界!\n\tfn main() { }"


@pytest.fixture
def json_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the cat"] * 5, trainer)
    path = tmp_path / "small" / "tokenizer.json"
    path.parent.mkdir()
    tokenizer.save(str(path))
    return path


def test_bytes_are_the_ids_and_256_ends_a_document():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    assert tokenizer.encode("Aü").tolist() == [65, 0xC3, 0xBC]
    assert tokenizer.decode([65, 0xC3, 0xBC, 256]) == "Aü"


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=50, deadline=None)
def test_bytes_and_characters_give_any_text_back(text):
    assert BytesTokenizer().decode(BytesTokenizer().encode(text)) == text
    characters = CharacterTokenizer(text + "x")
    assert characters.decode(characters.encode(text)) == text


def test_characters_outside_the_vocabulary_share_one_id(tmp_path):
    path = tmp_path / "training.txt"
    path.write_text("abcab")
    tokenizer = load_tokenizer("characters", [path])
    assert tokenizer.encode("cabzé").tolist() == [2, 0, 1, 3, 3]
    assert (tokenizer.eod, tokenizer.vocab_size) == (4, 5)
    assert tokenizer.decode([0, 3, 4]) == "a\N{REPLACEMENT CHARACTER}"


def test_characters_without_training_text_are_refused():
    with pytest.raises(DataError, match="takes its vocabulary from training text"):
        load_tokenizer("characters")


def test_a_tokenizer_json_without_an_end_of_document_token_gets_a_new_id(json_file):
    tokenizer = load_tokenizer(str(json_file))
    largest = max(json.loads(json_file.read_text())["model"]["vocab"].values())
    assert tokenizer.eod == largest + 1
    assert tokenizer.vocab_size == largest + 2
    assert tokenizer.decode([*tokenizer.encode(TEXT), tokenizer.eod]) == TEXT
    assert tokenizer.name == "small/tokenizer.json"


def test_a_tokenizer_json_that_cannot_encode_is_named_with_the_librarys_words(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "odd" / "tokenizer.json"
    path.parent.mkdir()
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]")).save(str(path))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.encode("a").tolist() == [0]
    with pytest.raises(DataError, match=r"tokenizer odd/tokenizer.json cannot encode the text: .*Missing \[UNK\]"):
        tokenizer.encode("b")


def test_gpt2_from_its_two_files_equals_its_tokenizer_json(shared):
    pytest.importorskip("tokenizers")
    folder = shared / "tokenizers" / "gpt2"
    two_files, one_file = load_tokenizer(f"gpt2:{folder}"), load_tokenizer(str(folder / "tokenizer.json"))
    assert two_files.encode("Hello world").tolist() == [15496, 995]
    assert (two_files.eod, two_files.vocab_size) == (50256, 50257)
    assert two_files.encode(TEXT * 9).tolist() == one_file.encode(TEXT * 9).tolist()
    assert two_files.decode(two_files.encode(TEXT)) == TEXT


def test_a_batch_is_encoded_as_its_texts_one_by_one(json_file):
    for tokenizer in (load_tokenizer("bytes"), load_tokenizer(str(json_file)), CharacterTokenizer(TEXT)):
        batch = tokenizer.encode_batch([TEXT, "", "the cat"])
        single = [tokenizer.encode(text) for text in (TEXT, "", "the cat")]
        assert [ids.tolist() for ids in batch] == [ids.tolist() for ids in single]
        assert {ids.dtype for ids in (*batch, *single)} == {np.dtype(np.int32)}


def test_a_saved_tokenizer_comes_back_the_same(tmp_path, json_file):
    for number, tokenizer in enumerate((BytesTokenizer(), CharacterTokenizer(TEXT), load_tokenizer(str(json_file)))):
        folder = tmp_path / str(number)
        tokenizer.save(folder)
        again = load_saved_tokenizer(folder)
        assert (again.name, again.fingerprint, again.eod) == (tokenizer.name, tokenizer.fingerprint, tokenizer.eod)
        assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
        assert load_tokenizer(str(folder)).fingerprint == tokenizer.fingerprint


def test_a_saved_tokenizer_that_was_changed_is_refused(tmp_path, json_file):
    load_tokenizer(str(json_file)).save(tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (tmp_path / "saved" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="changed after it was saved"):
        load_saved_tokenizer(tmp_path / "saved")


def test_different_tokenizers_have_different_fingerprints():
    tokenizers = BytesTokenizer(), CharacterTokenizer("ab"), CharacterTokenizer("abc")
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("byte", "must be bytes, characters, words, gpt2:FOLDER"),
        ("gpt2:nowhere", r"nowhere/vocab\.json does not exist"),
        ("broken.json", r"broken\.json is not a tokenizer\.json"),
    ],
)
def test_a_wrong_tokenizer_is_one_message(spec, message, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text('{"model": 1}')
    with pytest.raises(DataError, match=message):
        load_tokenizer(spec)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_saved_tokenizer(tmp_path)


def test_without_the_library_the_message_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(MissingExtraError, match=r"remoe\[data\]"):
        load_tokenizer(str(tmp_path))


def test_tokens_are_shown_printable():
    assert [BytesTokenizer().token_text(i) for i in (65, 10, 0xC3, 256)] == ["A", "\\n", "\\xc3", "<eod>"]
    characters = CharacterTokenizer("é\t")
    assert [characters.token_text(i) for i in range(4)] == ["\\t", "é", "\N{REPLACEMENT CHARACTER}", "<eod>"]


def test_a_model_must_have_all_ids_of_its_tokenizer_and_may_have_more():
    check_vocabulary(BytesTokenizer(), 257, fix="")
    check_vocabulary(BytesTokenizer(), None, fix="")
    message = r"model\.vocab_size is 256, must be at least 257, the ids of tokenizer bytes; set it to null$"
    with pytest.raises(ConfigError, match=message):
        check_vocabulary(BytesTokenizer(), 256, fix="set it to null")
