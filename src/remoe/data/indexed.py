"""Megatron's indexed datasets: PREFIX.bin holds the tokens, PREFIX.idx where sequences and documents lie.

PREFIX.idx, little endian: magic (9 bytes), uint64 version, uint8 type code, uint64 N sequences, uint64 D + 1,
int32 lengths [N], int64 byte pointers [N], int64 first sequence of each document and the end [D + 1].
"""

import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remoe.data.files import beside, sync, temporary
from remoe.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPE_CODES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats: no tokens
UINT16_VOCABULARY = 65500  # Megatron's limit; there is no code for uint32


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type Megatron stores ids of such a vocabulary in."""
    return np.dtype("<u2" if vocab_size < UINT16_VOCABULARY else "<i4")


class IndexedFile:
    """An opened .bin/.idx pair: `tokens` [N] mapped into memory, and start and length of each document in it.

    A document is all its sequences, which Megatron stores one after another. Raises DataError for a missing,
    truncated or otherwise damaged pair.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index = _read_index(prefix)
        self.dtype = index.dtype
        self.sequence_lengths = index.lengths
        self.document_indices = index.document_indices
        ends = np.concatenate(([0], np.cumsum(index.lengths, dtype=np.int64)))
        boundaries = ends[index.document_indices]
        self.document_starts: NDArray[np.int64] = boundaries[:-1]
        self.document_lengths: NDArray[np.int64] = np.diff(boundaries)
        self.tokens = _map_tokens(beside(prefix, ".bin"), self.dtype, int(ends[-1]))

    @property
    def num_documents(self) -> int:
        """Number of documents, empty ones included."""
        return len(self.document_starts)

    def document(self, index: int) -> NDArray[Any]:
        """The token ids of one document."""
        start = self.document_starts[index]
        return self.tokens[start : start + self.document_lengths[index]]


class IndexedWriter:
    """Writes a .bin/.idx pair document by document; a context manager.

    The pair appears when the `with` block ends, .bin first, each by a rename; after an exception or a kill there is
    no readable prefix.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        self.dtype = token_dtype(vocab_size)
        self._lengths = array("i")
        self._documents = array("q", [0])
        self._scratch = temporary(beside(prefix, ".bin"))
        self._bin = open(self._scratch, "wb")  # noqa: SIM115  closed by __exit__

    def add_document(self, tokens: NDArray[Any], lengths: Sequence[int] | None = None) -> None:
        """Append one document, by default as one sequence; `lengths` cut it into several."""
        self._add_sequences(tokens, [len(tokens)] if lengths is None else lengths)
        self._documents.append(len(self._lengths))

    def add_documents(self, tokens: NDArray[Any], lengths: Sequence[int]) -> None:
        """Append several documents of one sequence each: their tokens joined, and their lengths."""
        first = len(self._lengths)
        self._add_sequences(tokens, lengths)
        self._documents.extend(range(first + 1, len(self._lengths) + 1))

    def _add_sequences(self, tokens: NDArray[Any], lengths: Sequence[int]) -> None:
        assert sum(lengths) == len(tokens), "lengths must add up to the number of tokens"
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).tobytes())
        self._lengths.extend(int(length) for length in lengths)

    def index_bytes(self) -> bytes:
        """What PREFIX.idx will hold."""
        lengths = np.array(self._lengths, dtype="<i4")
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])  # int32 would overflow at 2 GiB
        pointers *= self.dtype.itemsize
        code = next(code for code, dtype in TYPE_CODES.items() if dtype == self.dtype.str)
        header = HEADER.pack(MAGIC, 1, code, len(lengths), len(self._documents))
        return header + lengths.tobytes() + pointers.tobytes() + np.array(self._documents, dtype="<i8").tobytes()

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        index_scratch = temporary(beside(self.prefix, ".idx"))
        try:
            if kind is None:
                sync(self._bin)
                with open(index_scratch, "wb") as file:
                    file.write(self.index_bytes())
                    sync(file)
                os.replace(self._scratch, beside(self.prefix, ".bin"))
                os.replace(index_scratch, beside(self.prefix, ".idx"))
        finally:
            self._bin.close()
            self._scratch.unlink(missing_ok=True)
            index_scratch.unlink(missing_ok=True)


class _Index:
    def __init__(self, path: Path, content: bytes) -> None:
        if content[: len(MAGIC)] != MAGIC:
            raise DataError(f"{path} is not a Megatron index: it does not start with the magic bytes MMIDIDX")
        if len(content) < HEADER.size:
            raise DataError(f"{path} is truncated: it has {len(content)} bytes, its header alone {HEADER.size}")
        _, version, code, num_sequences, num_boundaries = HEADER.unpack_from(content)
        if version != 1:
            raise DataError(f"{path} has version {version}, must be 1")
        if code not in TYPE_CODES:
            raise DataError(f"{path} has the type code {code}, must be that of an integer: {sorted(TYPE_CODES)}")
        expected = HEADER.size + 12 * num_sequences + 8 * num_boundaries
        if len(content) != expected:
            state = "truncated" if len(content) < expected else "damaged"
            raise DataError(f"{path} is {state}: it has {len(content)} bytes, its header asks for {expected}")
        self.dtype = np.dtype(TYPE_CODES[code])
        self.lengths = np.frombuffer(content, "<i4", num_sequences, HEADER.size)
        self.pointers = np.frombuffer(content, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
        self.document_indices = np.frombuffer(content, "<i8", num_boundaries, HEADER.size + 12 * num_sequences)
        self._check(path)

    def _check(self, path: Path) -> None:
        if (self.lengths < 0).any():
            raise DataError(f"{path} is damaged: a sequence has a negative length")
        ends = np.cumsum(self.lengths, dtype=np.int64) * self.dtype.itemsize
        if len(ends) and not (self.pointers[0] == 0 and np.array_equal(self.pointers[1:], ends[:-1])):
            raise DataError(f"{path} is damaged: its pointers do not follow from its lengths")
        documents = self.document_indices
        is_sound = len(documents) > 0 and documents[0] == 0 and documents[-1] == len(self.lengths)
        if not is_sound or (np.diff(documents) < 0).any():
            raise DataError(f"{path} is damaged: its documents do not cover its {len(self.lengths)} sequences in order")


def _read_index(prefix: Path) -> _Index:
    for ending, other in ((".idx", ".bin"), (".bin", ".idx")):
        if not beside(prefix, ending).is_file():
            raise DataError(f"{beside(prefix, ending)} does not exist; a dataset is PREFIX{ending} with PREFIX{other}")
    path = beside(prefix, ".idx")
    return _Index(path, path.read_bytes())


def _map_tokens(path: Path, dtype: np.dtype[Any], num_tokens: int) -> NDArray[Any]:
    size, expected = path.stat().st_size, num_tokens * dtype.itemsize
    if size != expected:
        state = "truncated" if size < expected else "damaged"
        raise DataError(f"{path} is {state}: it has {size} bytes, its index asks for {expected}")
    return np.memmap(path, dtype, "r") if num_tokens else np.empty(0, dtype)
