"""AutoTokenizer gives the ids and the text of our own tokenizers."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe.data.chat import TEMPLATES, encode, load_template
from remoe.data.subword import load_gpt2, load_json
from remoe.data.tokenizer import BytesTokenizer, CharacterTokenizer
from remoe.data.words import WordTokenizer
from remoe.export import tokenizer_files, write_tokenizer

pytestmark = pytest.mark.heavy
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TEXTS = [
    "",
    "Once upon a time,\nthere was <eod> and <|endoftext|>.",
    "  two  spaces\t tab\n\n lines \n",
    "naïve — 漢字 🙂 \u2028x",
    "don't we're 12345 x=y+1;",
]


def in_transformers(tokenizer, folder):
    tokenizer.save(folder)
    tokenizer_files.write(tokenizer, folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def own(kind, folder):
    if kind == "bytes":
        return BytesTokenizer()
    if kind == "characters":
        return CharacterTokenizer(string.ascii_letters + " .\n—")
    if kind == "words":
        return WordTokenizer(["there", "was", "a", "time,", "<eod>", "漢字"])
    library = pytest.importorskip("tokenizers")
    trained = library.Tokenizer(library.models.BPE())
    trained.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = library.decoders.ByteLevel()
    special = ["<|endoftext|>"] if kind != "json without end" else []
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet()
    )
    trained.train_from_iterator(TEXTS * 3, trainer)
    if kind == "gpt2":
        trained.model.save(str(folder))
        return load_gpt2(folder)
    trained.save(str(folder / "tokenizer.json"))
    return load_json(folder / "tokenizer.json")


@pytest.mark.parametrize("kind", ["bytes", "characters", "words", "json", "json without end", "gpt2"])
def test_ids_text_and_end_of_document_are_ours(kind, tmp_path):
    tokenizer = own(kind, tmp_path)
    theirs = in_transformers(tokenizer, tmp_path)
    assert theirs.eos_token_id == theirs.pad_token_id == tokenizer.eod
    for text in TEXTS:
        # where the end of a document had to be added to a tokenizer.json, transformers finds it in texts too
        text = text.replace("<eod>", "end") if kind == "json without end" else text
        ids = tokenizer.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
        assert theirs.decode([*ids, tokenizer.eod], skip_special_tokens=True) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["bytes", "characters", "words", "json"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_conversations_of_several_turns_have_the_ids_of_training(kind, template, tmp_path):
    tokenizer, chat = own(kind, tmp_path), load_template(template)
    write_tokenizer(tokenizer, tmp_path, chat)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": role, "content": f"there was a {role}"} for role in ("system", "user", "assistant", "user")]
    for turns in (messages[1:2], messages, messages[:3]):
        for goes_on in (False, True):
            found = theirs.apply_chat_template(turns, add_generation_prompt=goes_on)["input_ids"]
            assert found == encode(tokenizer, chat.render(turns, add_generation_prompt=goes_on)).tolist()
    assert encode(tokenizer, chat.render(messages)).tolist().count(tokenizer.eod) == 1


def test_saving_again_changes_nothing(tmp_path):
    theirs = in_transformers(BytesTokenizer(), tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert all(again(text)["input_ids"] == BytesTokenizer().encode(text).tolist() for text in TEXTS)


@pytest.fixture(scope="module")
def bytes_in_transformers(tmp_path_factory):
    return in_transformers(BytesTokenizer(), tmp_path_factory.mktemp("bytes"))


@settings(max_examples=60, deadline=None)
@given(text=st.text(), ids=st.lists(st.integers(0, 256), max_size=20))
def test_any_text_and_any_bytes_agree(bytes_in_transformers, text, ids):
    assert bytes_in_transformers(text)["input_ids"] == BytesTokenizer().encode(text).tolist()
    assert bytes_in_transformers.decode(ids, skip_special_tokens=True) == BytesTokenizer().decode(ids)
