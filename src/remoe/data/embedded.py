"""A corpus with no download: text of clearly different kinds that the installed Python and torch ship anyway.

Read in place and kept in the cache as jsonl. It depends on the installed versions, so results do not compare across
machines; the manifest beside it says what went in.
"""

import ast
import hashlib
import importlib.metadata as metadata
import importlib.util
import json
import re
import sys
import sysconfig
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from remoe.data.files import text_hash, to_json, write_whole
from remoe.errors import DataError

FORMAT = "1"
DOMAIN_BYTES = 1_000_000  # of each domain, so that all weigh about the same
DOCUMENT_BYTES = (200, 65_536)
TEST_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo", "pydoc_data"}
DULL_NAMES = ("CJK ", "HANGUL SYLLABLE", "TANGUT ", "KHITAN ", "NUSHU ", "EGYPTIAN HIEROGLYPH", "ANATOLIAN HIERO")


class Found(NamedTuple):
    """One document and where it is from."""

    name: str
    text: str


def embedded_corpus(cache: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The corpus as a jsonl file in the cache, and its manifest: domain, documents, bytes, sha256 of each.

    Gathered once for a set of installed versions, with a printed table; domains that are not installed are left out.
    """
    folder = cache / "embedded"
    path = folder / f"{_versions_hash()[:16]}.jsonl"
    manifest_path = path.with_suffix(".manifest.json")
    if path.is_file() and manifest_path.is_file():
        return path, json.loads(manifest_path.read_text(encoding="utf-8"))
    lines, manifest = _gather()
    _print_table(manifest)
    if not lines:
        raise DataError("the embedded corpus is empty: neither Python's nor torch's files can be read; give data.train")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, b"".join(lines))
        write_whole(manifest_path, to_json(manifest))
    except OSError as error:
        raise DataError(f"data.cache is {cache}, must be a folder to write to: {error.strerror}") from None
    return path, manifest


def _gather() -> tuple[list[bytes], list[dict[str, Any]]]:
    seen: set[bytes] = set()
    lines, manifest = [], []
    for domain, source in SOURCES.items():
        size, documents, digest = 0, 0, hashlib.sha256()
        for found in source():
            content = found.text.encode()
            key = hashlib.sha256(content).digest()
            if key in seen or not DOCUMENT_BYTES[0] <= len(content) <= DOCUMENT_BYTES[1]:
                continue
            seen.add(key)
            digest.update(content)
            size, documents = size + len(content), documents + 1
            row = {"text": found.text, "meta": {"pile_set_name": domain, "file": found.name}}
            lines.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            if size >= DOMAIN_BYTES:
                break
        manifest.append({"domain": domain, "documents": documents, "bytes": size, "sha256": digest.hexdigest()})
    return lines, manifest


def _print_table(manifest: list[dict[str, Any]]) -> None:
    print("embedded corpus, from what Python and torch ship:")
    for row in manifest:
        amount = f"{row['documents']:5d} documents {row['bytes'] / 1e6:6.2f} MB"
        print(f"  {row['domain']:16s} {amount if row['documents'] else 'not installed'}")


def _python_code() -> Iterator[Found]:
    """A quarter of the standard library as it is; the other files give the prose, so no text is in both."""
    root = _stdlib()
    return _read_files(root, (path for path in _stdlib_files() if _is_code(root, path)))


def _english_docs() -> Iterator[Found]:
    """Documentation strings, and the language reference that `help()` shows."""
    root = _stdlib()
    for found in _read_files(root, (path for path in _stdlib_files() if not _is_code(root, path))):
        text = "\n\n".join(_docstrings(found.text))
        yield Found(found.name, text)
    if importlib.util.find_spec("pydoc_data"):
        from pydoc_data.topics import topics

        yield from (Found(f"topics/{name}", text.strip() + "\n") for name, text in sorted(topics.items()))


def _cpp_headers() -> Iterator[Found]:
    return _package_files("torch", "include", (".h", ".hpp", ".cuh"))


def _type_stubs() -> Iterator[Found]:
    yield from _package_files("numpy", ".", (".pyi",))
    yield from _package_files("torch", ".", (".pyi",))


def _character_names() -> Iterator[Found]:
    """Tables of Unicode characters, 128 code points each."""
    for first in range(0, sys.maxunicode, 128):
        rows = [_character_row(code) for code in range(first, first + 128)]
        yield Found(f"U+{first:04X}", "".join(row for row in rows if row))


def _character_row(code: int) -> str:
    char = chr(code)
    name = unicodedata.name(char, "")
    if not name or name.startswith(DULL_NAMES):
        return ""
    return f"{code:04X};{name};{unicodedata.category(char)};{unicodedata.bidirectional(char)};{char}\n"


def _licences() -> Iterator[Found]:
    """Licences and descriptions of torch, numpy and what they need."""
    for name in _closure(("torch", "numpy")):
        distribution = metadata.distribution(name)
        root = Path(str(distribution.locate_file("")))
        yield from _read_files(root, (root / file for file in distribution.files or () if _is_licence(file)))


def _is_licence(file: metadata.PackagePath) -> bool:
    is_named_so = file.name.upper().startswith(("LICEN", "COPYING", "NOTICE", "METADATA"))
    return file.parts[0].endswith(".dist-info") and (is_named_so or "licenses" in file.parts)


SOURCES: dict[str, Callable[[], Iterator[Found]]] = {
    "Python code": _python_code,
    "English docs": _english_docs,
    "C++ headers": _cpp_headers,
    "Type stubs": _type_stubs,
    "Character names": _character_names,
    "Licences": _licences,
}


def _docstrings(source: str) -> Iterator[str]:
    try:
        waiting: list[ast.stmt | ast.Module] = [ast.parse(source)]
    except (SyntaxError, ValueError):  # a template, or for another version: it has no docstrings to give
        return
    while waiting:
        node = waiting.pop()
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        waiting.extend(reversed(node.body))
        text = ast.get_docstring(node)
        if text and len(text) > 60:
            yield text + "\n"


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_files() -> Iterator[Path]:
    root = _stdlib()
    return (path for path in root.rglob("*.py") if not TEST_FOLDERS & set(path.relative_to(root).parts))


def _is_code(root: Path, path: Path) -> bool:
    return _name_hash(root, path)[0] < 64


def _package_files(package: str, folder: str, endings: tuple[str, ...]) -> Iterator[Found]:
    spec = importlib.util.find_spec(package)  # does not import it
    for place in (spec and spec.submodule_search_locations) or ():
        root = Path(place) / folder
        yield from _read_files(root, (path for path in root.rglob("*") if path.suffix in endings))


def _read_files(root: Path, paths: Iterable[Path]) -> Iterator[Found]:
    """The UTF-8 files among some, in an order that depends on their names only and mixes folders."""
    for path in sorted(paths, key=lambda path: _name_hash(root, path)):
        try:
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):  # not readable here, or in an older encoding: no part of the corpus
            continue
        yield Found(path.relative_to(root).as_posix(), text)


def _name_hash(root: Path, path: Path) -> bytes:
    return hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()


def _closure(names: Iterable[str]) -> list[str]:
    """The installed distributions among these names and all that they require."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting.extend(re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements if "extra ==" not in line)
    return sorted(found)


def _versions_hash() -> str:
    versions = [f"{name} {metadata.version(name)}" for name in _closure(("torch", "numpy"))]
    return text_hash(FORMAT, str(DOMAIN_BYTES), sys.version, *versions)
