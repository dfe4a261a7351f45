"""Tokenised chunks: what one worker makes of one chunk, kept in a file of its own until all are joined."""

import hashlib
import io
import json
import os
import threading
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from remoe.data.files import write_whole
from remoe.data.indexed import token_dtype
from remoe.data.named_tokenizer import load_saved_tokenizer
from remoe.data.readers import Chunk, ReadConfig, parse_chunk
from remoe.data.tokenizer import Tokenizer


class Part(NamedTuple):
    """The tokens of a chunk's documents, joined; the documents' lengths and domains; the lines that were skipped."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    domain_of_document: NDArray[np.int64]
    domains: list[str]
    problems: list[str]
    empty: int


class PartTask(NamedTuple):
    """One chunk to tokenise, and the file its part goes to."""

    chunk: Chunk
    config: ReadConfig
    append_eod: bool
    to: Path


def tokenize(task: PartTask, tokenizer: Tokenizer) -> Part:
    """Tokenise a chunk. Raises DataError for a refused line."""
    parsed = parse_chunk(task.chunk, task.config)
    pieces = tokenizer.encode_batch([document.text for document in parsed.documents])
    eod = [tokenizer.eod] if task.append_eod else []
    dtype = token_dtype(tokenizer.vocab_size)
    ending = np.array(eod, dtype=dtype)
    joined = [piece.astype(dtype) for ids in pieces for piece in (ids, ending)]
    names = list(dict.fromkeys(document.domain for document in parsed.documents))
    place = {name: number for number, name in enumerate(names)}
    return Part(
        tokens=np.concatenate(joined) if joined else np.empty(0, dtype),
        lengths=np.array([len(ids) + len(eod) for ids in pieces], dtype=np.int64),
        domain_of_document=np.array([place[document.domain] for document in parsed.documents], dtype=np.int64),
        domains=names,
        problems=parsed.problems,
        empty=parsed.empty,
    )


def save_part(part: Part, path: Path) -> None:
    """Write a part; it appears whole or not at all."""
    words = json.dumps([part.domains, part.problems, part.empty]).encode()
    buffer = io.BytesIO()
    np.savez(
        buffer,
        tokens=part.tokens,
        lengths=part.lengths,
        domain_of_document=part.domain_of_document,
        words=np.frombuffer(words, np.uint8),
    )
    write_whole(path, buffer.getvalue())


def load_part(path: Path) -> Part:
    """What save_part wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        domains, problems, empty = json.loads(arrays["words"].tobytes())
        return Part(arrays["tokens"], arrays["lengths"], arrays["domain_of_document"], domains, problems, empty)


def chunk_digest(chunk: Chunk, settings: str) -> str:
    """A hash of all that decides a chunk's part: equal digests, equal parts, whatever happened in between."""
    digest = hashlib.sha256(f"{settings}\0{chunk.path}\0{chunk.first_line}\0{chunk.is_text}\0".encode())
    for record in chunk.records:
        digest.update(len(record).to_bytes(8, "little") + record)
    return digest.hexdigest()[:24]


_worker_tokenizer: Tokenizer | None = None


def start_worker(tokenizer_folder: Path) -> None:
    """Prepare a worker process: its tokenizer, and a watch on its parent, so that a killed run leaves none behind."""
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    _worker_tokenizer = load_saved_tokenizer(tokenizer_folder)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def work(task: PartTask) -> Path:
    """Tokenise a chunk in a worker process and save its part."""
    assert _worker_tokenizer is not None, "start_worker runs first"
    save_part(tokenize(task, _worker_tokenizer), task.to)
    return task.to


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "workers are started by multiprocessing"
    connection.wait([parent.sentinel])
    os._exit(1)
