"""Files that appear whole or not at all, and hashes of their content."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def beside(prefix: Path, ending: str) -> Path:
    """PREFIX + ending; unlike with_suffix it keeps the dots of a prefix such as `corpus.v1`."""
    return prefix.with_name(prefix.name + ending)


def temporary(path: Path) -> Path:
    """A hidden name beside `path`, of this process only, to write to before the rename."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a killed writer, never sees half of it."""
    scratch = temporary(path)
    scratch.unlink(missing_ok=True)  # it may be a link to elsewhere
    try:
        with open(scratch, "xb") as file:
            file.write(content)
            sync(file)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def sync(file: Any) -> None:
    """Wait until a file's bytes are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def to_json(value: Any) -> bytes:
    """The one JSON form used for files that must be the same bytes each time."""
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def file_hash(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_hash(*parts: str) -> str:
    """The sha256 of several strings, kept apart, in hexadecimal."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
