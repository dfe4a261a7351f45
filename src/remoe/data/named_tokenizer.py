"""The tokenizer that a setting names, or that a folder keeps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remoe.data import subword
from remoe.data.tokenizer import CARD, BytesTokenizer, CharacterTokenizer, Tokenizer, characters_of, read_card
from remoe.data.words import WordTokenizer, words_of
from remoe.errors import DataError


def load_tokenizer(spec: str, training_files: Sequence[Path] | None = None, text_key: str = "text") -> Tokenizer:
    """The tokenizer that a setting names.

    `bytes`; `characters` or `words` (need training_files, whose characters or words are the vocabulary); `gpt2:FOLDER`
    with vocab.json and merges.txt; a tokenizer.json of the tokenizers library; or a folder that holds one of them, such
    as a run's `tokenizer/`. Raises DataError for anything else. Only data is read: loading never executes code.
    """
    if spec == "bytes":
        return BytesTokenizer()
    if spec == "characters":
        return characters_of(training_files, text_key)
    if spec == "words":
        return words_of(training_files, text_key)
    if spec.startswith("gpt2:"):
        return subword.load_gpt2(Path(spec.removeprefix("gpt2:")))
    path = Path(spec)
    if (path / CARD).is_file():
        return load_saved_tokenizer(path)
    if (path / "tokenizer.json").is_file():
        return subword.load_json(path / "tokenizer.json")
    if path.is_file():
        return subword.load_json(path)
    raise DataError(
        f"tokenizer {spec!r} does not exist, must be bytes, characters, words, gpt2:FOLDER (with vocab.json and "
        "merges.txt), a tokenizer.json, or the tokenizer folder of a run"
    )


def load_saved_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `save(folder)` wrote. Raises DataError if a file is missing, or was changed since."""
    card = read_card(folder)
    kind = card.get("kind")
    if kind == "bytes":
        tokenizer: Tokenizer = BytesTokenizer()
    elif kind == "characters":
        tokenizer = CharacterTokenizer("".join(_vocabulary(folder, card, "characters")))
    elif kind == "words":
        tokenizer = WordTokenizer(_vocabulary(folder, card, "words"))
    elif kind in subword.KINDS:
        tokenizer = subword.load_saved(folder, kind, card["name"])
    else:
        raise DataError(f"{folder / CARD} names the tokenizer kind {kind!r}, which this version does not know")
    if tokenizer.fingerprint != card.get("fingerprint"):
        raise DataError(f"the tokenizer in {folder} was changed after it was saved: its fingerprint does not match")
    return tokenizer


def _vocabulary(folder: Path, card: dict[str, Any], key: str) -> Sequence[str]:
    """A list of texts, or one text, in a card."""
    values = card.get(key)
    if not isinstance(values, str | list) or not all(isinstance(value, str) for value in values):
        raise DataError(f"{folder / CARD} is damaged: it must hold the tokenizer's {key}")
    return values
