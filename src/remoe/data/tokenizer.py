"""Text to token ids and back: what a tokenizer is, how it is kept, and those of bytes and of characters."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from remoe.data.files import to_json, write_whole
from remoe.data.readers import iter_texts
from remoe.errors import ConfigError, DataError

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


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int | None, fix: str) -> None:
    """Raise ConfigError, with `fix` at its end, where a tokenizer has more ids than a model; None: not known yet."""
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size is {vocab_size}, must be at least {tokenizer.vocab_size}, the ids of tokenizer "
            f"{tokenizer.name}; {fix}"
        )


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


def characters_of(training_files: Sequence[Path] | None, text_key: str = "text") -> CharacterTokenizer:
    """The tokenizer of all characters in the training text. DataError where there are none."""
    return CharacterTokenizer("".join(pieces_in(training_files, text_key, "characters", iter)))


def pieces_in(
    training_files: Sequence[Path] | None, text_key: str, name: str, split: Callable[[str], Iterable[str]]
) -> Counter[str]:
    """How often the training text has each piece that tokenizer `name` splits it into. DataError where it has none."""
    if not training_files:
        raise DataError(
            f"tokenizer {name!r} takes its vocabulary from training text, and there is none; "
            "for a prepared dataset name the folder PREFIX.tokenizer"
        )
    counts: Counter[str] = Counter()
    for text in iter_texts(training_files, text_key):
        counts.update(split(text))
    if not counts:
        raise DataError(f"{training_files[0]} holds no {name}, so tokenizer {name!r} would have no vocabulary")
    return counts
