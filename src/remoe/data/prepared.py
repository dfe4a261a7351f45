"""A dataset on disk with all that belongs to it.

PREFIX.bin and .idx, .domains.json (names, and one index a document), .manifest.json (tokenizer, counts, inputs),
.tokenizer (a folder), and .skipped.txt where lines were skipped. Only .bin and .idx are needed to read one.
"""

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remoe.data.dataset import SCAN_BYTES, Documents, TokenDataset
from remoe.data.files import beside, file_hash, to_json, write_whole
from remoe.data.indexed import IndexedFile, IndexedWriter
from remoe.data.parts import Part
from remoe.data.tokenizer import Tokenizer
from remoe.errors import DataError

SIDECARS = (".domains.json", ".manifest.json", ".skipped.txt")
SUMMED = (".bin", ".idx", ".domains.json")
"""What the manifest has checksums of."""


class PreparedWriter:
    """Joins parts into one dataset, PREFIX.bin and .idx with what belongs to them; a context manager."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        self.num_documents = 0
        self._prefix, self._tokenizer = prefix, tokenizer
        self._writer = IndexedWriter(prefix, tokenizer.vocab_size)
        self._domains: dict[str, int] = {}
        self._domain_of_document: list[NDArray[np.int64]] = []
        self._tokens_of_domain: list[int] = []
        self.skipped: list[str] = []
        self._empty = 0

    def add(self, part: Part) -> None:
        """Append the documents of a part."""
        self._writer.add_documents(part.tokens, part.lengths.tolist())
        for name in part.domains:
            if name not in self._domains:
                self._domains[name] = len(self._domains)
                self._tokens_of_domain.append(0)
        places = np.array([self._domains[name] for name in part.domains], dtype=np.int64)
        domains = places[part.domain_of_document]
        for place in places:
            self._tokens_of_domain[place] += int(part.lengths[domains == place].sum())
        self._domain_of_document.append(domains)
        self.skipped.extend(part.problems)
        self._empty += part.empty
        self.num_documents += len(part.lengths)

    def write_sidecars(self, inputs: list[str], append_eod: bool) -> None:
        """Write everything but the tokens; once those are in place."""
        domains = np.concatenate([np.empty(0, np.int64), *self._domain_of_document])
        table = {"domains": list(self._domains), "domain_of_document": domains.tolist()}
        write_whole(beside(self._prefix, ".domains.json"), json.dumps(table, ensure_ascii=False).encode())
        write_whole(beside(self._prefix, ".manifest.json"), to_json(self._manifest(inputs, append_eod)))
        if self.skipped:
            write_whole(beside(self._prefix, ".skipped.txt"), ("\n".join(self.skipped) + "\n").encode())
        self._tokenizer.save(beside(self._prefix, ".tokenizer"))

    def _manifest(self, inputs: list[str], append_eod: bool) -> dict[str, Any]:
        tokenizer = self._tokenizer
        return {
            "format": "remoe-dataset-1",
            "tokenizer": {
                "name": tokenizer.name,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "eod": tokenizer.eod,
            },
            "append_eod": append_eod,
            "documents": self.num_documents,
            "tokens": sum(self._tokens_of_domain),
            "tokens_per_domain": dict(zip(self._domains, self._tokens_of_domain, strict=True)),
            "empty_texts": self._empty,
            "skipped_lines": len(self.skipped),
            "inputs": inputs,
            "sha256": {ending: file_hash(beside(self._prefix, ending)) for ending in SUMMED},
        }

    def __enter__(self) -> "PreparedWriter":
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)


def move_dataset(source: Path, target: Path) -> None:
    """Rename a dataset to another prefix of the same disk, replacing one there; .idx, which makes it readable, last."""
    beside(target, ".idx").unlink(missing_ok=True)
    for ending in SIDECARS:
        if beside(source, ending).exists():
            os.replace(beside(source, ending), beside(target, ending))
        elif ending == ".skipped.txt":
            beside(target, ending).unlink(missing_ok=True)
    if beside(source, ".tokenizer").exists():
        shutil.rmtree(beside(target, ".tokenizer"), ignore_errors=True)
        os.replace(beside(source, ".tokenizer"), beside(target, ".tokenizer"))
    for ending in (".bin", ".idx"):
        os.replace(beside(source, ending), beside(target, ending))


def open_prefix(prefix: Path, tokenizer: Tokenizer, default_domain: str = "text") -> TokenDataset:
    """The documents of a .bin/.idx pair. Documents without PREFIX.domains.json are of the default domain.

    Raises DataError if a file is missing or damaged, or the dataset was made with another tokenizer.
    """
    file = IndexedFile(prefix)
    manifest = read_manifest(prefix)
    _check_tokenizer(prefix, manifest.get("tokenizer", {}), tokenizer)
    names, domains = _read_domains(prefix, file.num_documents, default_domain)
    _check_sums(prefix, manifest.get("sha256"))
    documents = Documents(file.document_starts, file.document_lengths, domains)
    dataset = TokenDataset(file.tokens, documents, names, tokenizer.vocab_size, str(prefix))
    dataset.check_all_ids()
    return dataset


def _check_sums(prefix: Path, sums: Any) -> None:
    """Compare with the manifest's checksums, where it has some. Files above SCAN_BYTES are not read through."""
    if sums is None:
        return
    for ending in SUMMED:
        path = beside(prefix, ending)
        if path.exists() and path.stat().st_size > SCAN_BYTES:
            continue
        if not isinstance(sums, dict) or not path.exists() or sums.get(ending) != file_hash(path):
            raise DataError(f"{path} is damaged: it does not match the checksum in {prefix.name}.manifest.json")


def read_manifest(prefix: Path) -> dict[str, Any]:
    """The manifest of a dataset; empty where there is none, as with Megatron's own datasets."""
    return _read_json(beside(prefix, ".manifest.json")) or {}


def _check_tokenizer(prefix: Path, made_with: dict[str, Any], tokenizer: Tokenizer) -> None:
    if made_with and made_with.get("fingerprint") != tokenizer.fingerprint:
        raise DataError(
            f"{prefix} was made with tokenizer {made_with.get('name')!r} of {made_with.get('vocab_size')} ids, "
            f"data.tokenizer is {tokenizer.name!r} of {tokenizer.vocab_size}; "
            f"set data.tokenizer to {beside(prefix, '.tokenizer')}, or prepare the text again"
        )


def _read_domains(prefix: Path, num_documents: int, default: str) -> tuple[list[str], NDArray[np.int64]]:
    path = beside(prefix, ".domains.json")
    table = _read_json(path)
    if table is None:
        return [default], np.zeros(num_documents, dtype=np.int64)
    try:
        names = [str(name) for name in table["domains"]]
        domains = np.array(table["domain_of_document"], dtype=np.int64)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise DataError(f"{path} is damaged: it must hold `domains` and `domain_of_document`") from None
    if len(domains) != num_documents:
        raise DataError(f"{path} names the domains of {len(domains)} documents, the dataset has {num_documents}")
    if num_documents and not (domains.min() >= 0 and domains.max() < len(names)):
        raise DataError(f"{path} is damaged: a document's domain is not one of its {len(names)} names")
    return names, domains


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} is damaged: it must hold a JSON object")
    return value
