"""Documents of text, jsonl and parquet files, compressed or not: files to chunks of raw lines, chunks to documents.

Chunks are a function of the file's bytes alone, so work on them can be shared out, and taken up again after a stop.
"""

import io
import json
import lzma
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from remoe.config import check_choice, config_class, setting
from remoe.data.unfolding import check_unfolding, decompressed
from remoe.errors import DataError, MissingExtraError

PILE_FIELD = "meta.pile_set_name"
COMPRESSIONS = (".gz", ".xz", ".zst")
DOCUMENT_BYTES = 65536  # a longer text file is cut at paragraph ends: shuffling and held-out parts need documents
CHUNK_BYTES = 4 << 20
BOM = b"\xef\xbb\xbf"
OTHER_FORMATS = {  # how to make text of what is often mistaken for it
    ".csv": 'pandas.read_csv("FILE").to_json("FILE.jsonl", orient="records", lines=True)',
    ".tsv": 'pandas.read_csv("FILE", sep="\\t").to_json("FILE.jsonl", orient="records", lines=True)',
    ".html": "pandoc FILE -t plain -o FILE.txt",
    ".htm": "pandoc FILE -t plain -o FILE.txt",
    ".pdf": "pdftotext FILE FILE.txt",
    ".zip": "unzip FILE, and name what was in it",
}
SKIPPING = "skip such lines with --on-bad-line skip (prepare) or --set data.on_bad_line=skip (train)"


@config_class
class ReadConfig:
    """How rows become documents."""

    text_key: str = setting("text", "key of a row's text")
    domain_field: str | None = setting(None, "key of a row's domain, dotted; null: meta.pile_set_name if there")
    on_bad_line: str = setting("refuse", "refuse or skip a line that is not valid")
    default_domain: str = setting("text", "domain of documents that name none")

    def __post_init__(self) -> None:
        check_choice("on_bad_line", self.on_bad_line, ("refuse", "skip"))


class Document(NamedTuple):
    """One text and what kind of text it is."""

    text: str
    domain: str


class Chunk(NamedTuple):
    """Consecutive raw records of a file; joined, they are its bytes. `position`: bytes of the file read so far."""

    path: Path
    is_text: bool
    first_line: int
    records: list[bytes]
    position: int


class Parsed(NamedTuple):
    """A chunk's documents, its bad lines as messages with file and line, and the number of empty texts left out."""

    documents: list[Document]
    problems: list[str]
    empty: int


class _BadRowError(ValueError):
    """A row that gives no document, and what to set if all rows are like it."""

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.fix = fix


class _Problem(NamedTuple):
    line: int
    reason: str
    fix: str = ""


def check_file(path: Path, or_prefix: bool = False) -> None:
    """Raise DataError unless there is a file with something in it that is no other format.

    `or_prefix`: the message for a missing file offers a prepared dataset's prefix too.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder, must be a file; name its files one by one")
    if not path.exists():
        prefix = ", or the prefix of a .bin/.idx pair" if or_prefix else ""
        raise DataError(f"{path} does not exist, must be a text, jsonl or parquet file{prefix}")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty, must hold some text")
    ending = Path(_plain_name(path)).suffix
    if ending in OTHER_FORMATS:
        raise DataError(
            f"{path} is a {ending} file, must be plain text (.txt, .py, ...), jsonl or parquet, or these as .gz, .xz "
            f"or .zst; convert it: {OTHER_FORMATS[ending].replace('FILE', path.name)}"
        )


def read_documents(path: Path, config: ReadConfig) -> Iterator[Document]:
    """Every document of a file in order. Raises DataError for a missing or unreadable file, or a refused line."""
    for chunk in iter_chunks(path):
        yield from parse_chunk(chunk, config).documents


def iter_texts(paths: Sequence[Path], text_key: str) -> Iterator[str]:
    """The texts that a vocabulary is made of; bad lines are left out, and told when the file is tokenised.

    Raises DataError for the first bad line where there is no other.
    """
    found = False
    for path in paths:
        for document in read_documents(path, ReadConfig(text_key=text_key, on_bad_line="skip")):
            found = True
            yield document.text
    if not found:
        for path in paths:
            deque(read_documents(path, ReadConfig(text_key=text_key)), maxlen=0)


def iter_chunks(path: Path, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Cut a file into chunks of whole records, each of about chunk_bytes once decompressed."""
    check_file(path)
    with _readable(path), open(path, "rb") as raw:
        kind = _kind(path)
        if kind == "parquet":
            records = _parquet_records(path)
        else:
            stream = decompressed(path, raw)
            records = _text_records(stream) if kind == "text" else _lines(stream)
        yield from _grouped(path, kind, records, raw, chunk_bytes)


def parse_chunk(chunk: Chunk, config: ReadConfig) -> Parsed:
    """The documents of a chunk. With on_bad_line = refuse the first bad line raises DataError, with file and line."""
    parsed, problems = Parsed([], [], 0), list[_Problem]()
    empty, line = 0, chunk.first_line
    for record in chunk.records:
        documents, bad = _parse_text(record, line, config) if chunk.is_text else _parse_row(record, line, config)
        line += record.count(b"\n")
        empty += sum(not document.text for document in documents)
        parsed.documents.extend(document for document in documents if document.text)
        parsed.problems.extend(f"{chunk.path}:{problem.line}: {problem.reason}" for problem in bad)
        problems.extend(bad)
    if problems and config.on_bad_line == "refuse":
        some_are_good = bool(parsed.documents or empty)
        raise DataError(f"{parsed.problems[0]}; {_advice(problems[0], chunk.path, some_are_good)}")
    return parsed._replace(empty=empty)


def _advice(problem: _Problem, path: Path, some_are_good: bool) -> str:
    """How to go on; skipping is no way where nothing would be left."""
    if problem.fix:
        return f"{problem.fix}; or {SKIPPING}" if some_are_good else problem.fix
    if not some_are_good and _plain_name(path).endswith(".json"):
        return f"a .json file must hold one object a line; convert it: jq -c '.[]' {path.name} > {path.stem}.jsonl"
    return f"mend the line, or {SKIPPING}"


Findings = tuple[list[Document], list[_Problem]]


def _parse_text(record: bytes, line: int, config: ReadConfig) -> Findings:
    try:
        return [Document(record.decode("utf-8"), config.default_domain)], []
    except UnicodeDecodeError:
        return _parse_broken_text(record, line, config)


def _parse_broken_text(record: bytes, line: int, config: ReadConfig) -> Findings:
    good, problems = [], list[_Problem]()
    for number, raw in enumerate(io.BytesIO(record), line):
        try:
            good.append(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            problems.append(_Problem(number, _not_utf8(error)))
    return [Document("".join(good), config.default_domain)], problems


def _parse_row(record: bytes, line: int, config: ReadConfig) -> Findings:
    if record.isspace():
        return [], []
    try:
        return [_document(json.loads(record.decode("utf-8")), config)], []
    except UnicodeDecodeError as error:
        return [], [_Problem(line, _not_utf8(error))]
    except json.JSONDecodeError as error:
        return [], [_Problem(line, f"not valid JSON ({error.msg} at column {error.colno})")]
    except RecursionError:
        return [], [_Problem(line, "JSON is nested too deep")]
    except _BadRowError as error:
        return [], [_Problem(line, str(error), error.fix)]


def _document(row: Any, config: ReadConfig) -> Document:
    if not isinstance(row, dict):
        raise _BadRowError(f"holds a JSON {_json_type(row)}, must be an object with the key {config.text_key!r}")
    if config.text_key not in row:
        raise _BadRowError(f"has no key {config.text_key!r}; its keys are {_keys(row)}", _text_fix(row))
    text = row[config.text_key]
    if not isinstance(text, str):
        raise _BadRowError(f"key {config.text_key!r} holds a JSON {_json_type(text)}, must be a string")
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise _BadRowError(f"key {config.text_key!r} holds half a surrogate pair, which is no Unicode text")
    return Document(text, _domain(row, config))


def _domain(row: dict[str, Any], config: ReadConfig) -> str:
    value: Any = row
    for key in (config.domain_field or PILE_FIELD).split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, str) and value:
        return value
    if config.domain_field:
        reason = f"has no domain in {config.domain_field!r}, must hold a string; its keys are {_keys(row)}"
        raise _BadRowError(
            reason, "name another key: --domain-field KEY (prepare), --set data.domain_field=KEY (train)"
        )
    return config.default_domain


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(map(repr, list(row)[:8])) or "none"


def _text_fix(row: dict[str, Any]) -> str:
    """The key with the longest text is likely the one that is meant."""
    texts = {key: len(value) for key, value in row.items() if isinstance(value, str)}
    key = max(texts, key=texts.__getitem__, default="KEY")
    return f"name the key of the text: --key {key} (prepare), --set data.text_field={key} (train)"


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset {error.start} of the line)"


def _plain_name(path: Path) -> str:
    """A file's name in lower case, without the ending of a compression."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return name


def _kind(path: Path) -> str:
    name = _plain_name(path)
    if name.endswith(".parquet"):
        return "parquet"
    return "rows" if name.endswith((".jsonl", ".ndjson", ".json")) else "text"


def _grouped(path: Path, kind: str, records: Iterator[bytes], raw: IO[bytes], chunk_bytes: int) -> Iterator[Chunk]:
    group: list[bytes] = []
    size, first_line, line = 0, 1, 1
    for record in records:
        group.append(record)
        size += len(record)
        line += record.count(b"\n")
        if size >= chunk_bytes:
            yield Chunk(path, kind == "text", first_line, group, raw.tell())
            group, size, first_line = [], 0, line
    if group:
        yield Chunk(path, kind == "text", first_line, group, path.stat().st_size)


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    for number, line in enumerate(stream):
        yield line.removeprefix(BOM) if number == 0 else line


def _text_records(stream: IO[bytes]) -> Iterator[bytes]:
    rest = stream.read(DOCUMENT_BYTES).removeprefix(BOM)
    while block := stream.read(DOCUMENT_BYTES):
        rest += block
        while len(rest) > DOCUMENT_BYTES:
            cut = _paragraph_end(rest[:DOCUMENT_BYTES])
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _paragraph_end(block: bytes) -> int:
    """Where to cut: after the last blank line of the second half, else after its last line, else its last character."""
    half = len(block) // 2
    for end in (b"\n\n", b"\n"):
        found = block.rfind(end, half)
        if found >= 0:
            return found + len(end)
    cut = len(block) - 1
    while cut > half and block[cut] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        cut -= 1
    return cut


def _parquet_records(path: Path) -> Iterator[bytes]:
    """Each row as a line of JSON, so that all rows go one way."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtraError("pyarrow", "data") from None
    size = 0
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        left = file.metadata.num_rows
        for batch in file.iter_batches(batch_size=1024):
            size, left = size + batch.nbytes, left - batch.num_rows
            check_unfolding(path, size)
            for row in batch.to_pylist():
                yield json.dumps(row, ensure_ascii=False, default=_plain).encode("utf-8", "surrogatepass") + b"\n"
    if left:
        raise DataError(
            f"{path} is damaged: it announces {abs(left)} rows {'more' if left > 0 else 'fewer'} than it holds"
        )


def _plain(value: Any) -> str | None:
    """A parquet value that JSON has no form for; text may lie in a binary column."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the libraries raise for a damaged file into one DataError that names it."""
    try:
        yield
    except (DataError, MissingExtraError):
        raise
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} is damaged and cannot be decompressed: {error}") from None
    except PermissionError:
        raise DataError(f"{path} cannot be read: permission denied") from None
    except Exception as error:
        is_pyarrows_own = isinstance(error, ValueError | OverflowError) or getattr(error, "errno", 0) is None
        if is_pyarrows_own or type(error).__module__.partition(".")[0] in ("zstandard", "pyarrow", "gzip"):
            raise DataError(f"{path} is damaged and cannot be read: {error}") from None
        raise
