"""Sub-word tokenizers of the tokenizers library: any tokenizer.json, and GPT-2's vocab.json with merges.txt."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from remoe.data.files import write_whole
from remoe.data.tokenizer import EOD_TEXT, UNKNOWN, Ids, printable, write_card
from remoe.errors import DataError, MissingExtraError

KINDS = {"json": ("tokenizer.json",), "gpt2": ("vocab.json", "merges.txt")}
EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<eod>", "</s>", "<eos>", "[EOS]", "[SEP]")


class SubwordTokenizer:
    """A tokenizer of the tokenizers library, kept with the files that it was read from.

    Its end-of-document id is that of the first of EOD_TOKENS in its vocabulary; without one, a new id is added.
    """

    def __init__(self, library: Any, kind: str, name: str, files: dict[str, bytes]) -> None:
        self.name = name
        self.fingerprint = _fingerprint(kind, files)
        self._library, self._kind, self._files = library, kind, files
        vocabulary = library.get_vocab(with_added_tokens=True)
        if len(set(vocabulary.values())) < len(vocabulary):
            raise DataError(f"tokenizer {name} is damaged: two of its tokens have the same id")
        first_free = max(vocabulary.values(), default=-1) + 1  # ids may have gaps: the size is not the largest
        self.eod: int = next((vocabulary[token] for token in EOD_TOKENS if token in vocabulary), first_free)
        self.vocab_size: int = max(first_free, self.eod + 1)

    @property
    def eod_text(self) -> str:
        """The end-of-document token as the library writes it; EOD_TEXT where it is an added one."""
        return self._library.id_to_token(self.eod) or EOD_TEXT

    def library_json(self) -> str:
        """The tokenizer.json of the tokenizers library."""
        return self._library.to_str()

    def encode(self, text: str) -> Ids:
        """See Tokenizer."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See Tokenizer; the library's own threads share the work."""
        try:
            encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # noqa: BLE001  the library raises plain Exception
            raise DataError(f"tokenizer {self.name} cannot encode the text: {error}") from None
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        return self._library.decode([int(i) for i in ids if i != self.eod], skip_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        """See Tokenizer; a token that is part of a character is shown as the library writes it."""
        if token_id == self.eod:
            return EOD_TEXT
        text = self._library.decode([int(token_id)], skip_special_tokens=False)
        if not text or UNKNOWN in text:
            text = self._library.id_to_token(int(token_id)) or f"<{token_id}>"
        return printable(text)

    def save(self, folder: Path) -> None:
        """See Tokenizer; the files are written byte for byte as they were read."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            write_whole(folder / name, content)
        write_card(self, folder, self._kind)


def load_json(path: Path, name: str | None = None) -> SubwordTokenizer:
    """A tokenizer.json of the tokenizers library. Raises DataError if the file is not one."""
    library = _import_library()
    content = _read(path)
    try:
        tokenizer = library.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # noqa: BLE001  the library raises plain Exception
        raise DataError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from None
    name = name or f"{path.absolute().parent.name}/{path.name}"
    return SubwordTokenizer(tokenizer, "json", name, {"tokenizer.json": content})


def load_gpt2(folder: Path, name: str | None = None) -> SubwordTokenizer:
    """GPT-2's byte-level BPE from a folder with vocab.json and merges.txt. Raises DataError if they do not fit."""
    library = _import_library()
    files = {file: _read(folder / file) for file in KINDS["gpt2"]}
    try:
        vocabulary = json.loads(files["vocab.json"])
        tokenizer = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=_merges(files["merges.txt"])))
    except Exception as error:  # noqa: BLE001  the library raises plain Exception
        raise DataError(f"{folder} does not hold GPT-2's vocab.json and merges.txt: {error}") from None
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return SubwordTokenizer(tokenizer, "gpt2", name or "gpt2", files)


def load_saved(folder: Path, kind: str, name: str) -> SubwordTokenizer:
    """What SubwordTokenizer.save wrote."""
    return load_gpt2(folder, name) if kind == "gpt2" else load_json(folder / "tokenizer.json", name)


def _merges(content: bytes) -> list[tuple[str, str]]:
    lines = content.decode("utf-8").replace("\r", "").split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    return pairs  # type: ignore[return-value]


def _import_library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise MissingExtraError("tokenizers", "data") from None
    return tokenizers


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"tokenizer file {path} does not exist") from None
    except OSError as error:
        raise DataError(f"tokenizer file {path} cannot be read: {error.strerror}") from None


def _fingerprint(kind: str, files: dict[str, bytes]) -> str:
    digest = hashlib.sha256(kind.encode())
    for name in sorted(files):
        digest.update(b"\0" + name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
    return digest.hexdigest()
