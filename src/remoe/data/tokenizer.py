"""Text to token ids and back: the tokenizers, how a setting names one, and how a run keeps its own."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from remoe.data.files import to_json, write_whole
from remoe.data.readers import iter_texts
from remoe.errors import DataError

CARD = "remoe_tokenizer.json"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
EOD_TEXT = "<eod>"

Ids = NDArray[np.int32]


class Tokenizer(Protocol):
    """Text to ids in [0, vocab_size) and back; `eod` is the id that ends a document, `encode` never adds it."""

    @property
    def name(self) -> str:
        """What people call it; two tokenizers are the same when their fingerprints are."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of ids, the end-of-document id included."""
        ...

    @property
    def eod(self) -> int:
        """The end-of-document id."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides the ids."""
        ...

    def encode(self, text: str) -> Ids:
        """The ids of a text, int32."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of several texts, in parallel where the tokenizer can."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; end-of-document ids leave nothing."""
        ...

    def token_text(self, token_id: int) -> str:
        """One token for display: printable, control characters escaped."""
        ...

    def save(self, folder: Path) -> None:
        """Write everything that load_saved_tokenizer needs."""
        ...


def load_tokenizer(spec: str, training_files: Sequence[Path] | None = None, text_key: str = "text") -> Tokenizer:
    """The tokenizer that a setting names.

    `bytes`; `characters` or `words` (need training_files, whose characters or words are the vocabulary); `gpt2:FOLDER`
    with vocab.json and merges.txt; a tokenizer.json of the tokenizers library; or a folder that holds one of them, such
    as a run's `tokenizer/`. Raises DataError for anything else. Only data is read: loading never executes code.
    """
    from remoe.data import subword
    from remoe.data.words import words_of

    if spec == "bytes":
        return BytesTokenizer()
    if spec == "characters":
        return _characters_of(training_files, text_key)
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
    from remoe.data import subword
    from remoe.data.words import WordTokenizer

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


def read_card(folder: Path) -> dict[str, Any]:
    """The description of a saved tokenizer."""
    path = folder / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder} holds no tokenizer ({CARD} is missing)") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if not isinstance(card, dict) or not {"kind", "name", "fingerprint"} <= card.keys():
        raise DataError(f"{path} is damaged: it must name kind, name and fingerprint")
    return card


def write_card(tokenizer: Tokenizer, folder: Path, kind: str, **more: Any) -> None:
    """Write the description that makes a folder a saved tokenizer."""
    card = {
        "kind": kind,
        "name": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "fingerprint": tokenizer.fingerprint,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CARD, to_json(card | more))


def printable(text: str) -> str:
    """The text with control characters and the like escaped, for display."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class BytesTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 as the end of a document. Any text, no vocabulary file."""

    name = "bytes"
    vocab_size = 257
    eod = 256
    fingerprint = hashlib.sha256(b"remoe bytes 257").hexdigest()

    def encode(self, text: str) -> Ids:
        """See Tokenizer."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See Tokenizer."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer; bytes that are no UTF-8 become the replacement character."""
        return bytes(int(i) for i in ids if i < self.eod).decode("utf-8", errors="replace")

    def token_text(self, token_id: int) -> str:
        """See Tokenizer; a byte outside ASCII is shown as \\xNN."""
        if token_id >= self.eod:
            return EOD_TEXT
        return printable(chr(token_id)) if token_id < 128 else f"\\x{token_id:02x}"

    def save(self, folder: Path) -> None:
        """See Tokenizer."""
        write_card(self, folder, "bytes")


class CharacterTokenizer:
    """One id a character of a given vocabulary, then one for all others, then the end-of-document id."""

    name = "characters"

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.unknown = len(self.characters)
        self.eod = self.unknown + 1
        self.vocab_size = self.eod + 1
        self.fingerprint = hashlib.sha256(b"remoe characters " + self.characters.encode()).hexdigest()
        self._codes = np.frombuffer(self.characters.encode("utf-32-le"), dtype="<u4")

    def encode(self, text: str) -> Ids:
        """See Tokenizer; a character outside the vocabulary becomes the unknown id."""
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = np.searchsorted(self._codes, codes)
        known = self._codes[np.minimum(ids, self.unknown - 1)] == codes
        return np.where(known, ids, self.unknown).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See Tokenizer."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer; the unknown id becomes the replacement character."""
        table = self.characters + UNKNOWN
        return "".join(table[i] for i in ids if i < self.eod)

    def token_text(self, token_id: int) -> str:
        """See Tokenizer."""
        return EOD_TEXT if token_id >= self.eod else printable(self.decode([token_id]))

    def save(self, folder: Path) -> None:
        """See Tokenizer."""
        write_card(self, folder, "characters", characters=self.characters)


def _characters_of(training_files: Sequence[Path] | None, text_key: str) -> CharacterTokenizer:
    if not training_files:
        raise DataError(
            "tokenizer 'characters' takes its vocabulary from training text, and there is none; "
            "for a prepared dataset name the folder PREFIX.tokenizer"
        )
    found: set[str] = set()
    for text in iter_texts(training_files, text_key):
        found.update(text)
    if not found:
        raise DataError(f"{training_files[0]} holds no text, so tokenizer 'characters' would have no vocabulary")
    return CharacterTokenizer("".join(found))
