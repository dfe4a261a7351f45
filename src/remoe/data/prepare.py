"""Tokenise files into one Megatron dataset with domains: in parallel, and taken up where it was stopped.

While it works, PREFIX.partial holds one file a finished chunk, named by a hash of all that decides its content. A new
run reads the input again, skips the chunks that it finds there, and so ends with the same bytes as one never stopped.
"""

import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from remoe.config import check_choice, check_range, config_class, setting
from remoe.data.files import beside, file_hash, text_hash, write_whole
from remoe.data.named_tokenizer import load_tokenizer
from remoe.data.parts import PartTask, chunk_digest, load_part, save_part, start_worker, tokenize, work
from remoe.data.prepared import PreparedWriter, move_dataset, read_manifest
from remoe.data.progress import FileProgress
from remoe.data.readers import CHUNK_BYTES, Chunk, ReadConfig, check_file, iter_chunks
from remoe.data.tokenizer import Tokenizer
from remoe.errors import DataError

FORMAT = "1"  # counts up when the same input would give other tokens


@config_class
class PrepareConfig:
    """How `prepare` reads and how it works."""

    key: str = setting("text", "key of a row's text")
    domain_field: str | None = setting(None, "key of a row's domain, dotted; null: meta.pile_set_name if there")
    default_domain: str | None = setting(
        None, "domain of documents that name none; null: text, or the file's name where there are several inputs"
    )
    on_bad_line: str = setting("refuse", "refuse or skip a line that is not valid (skipped ones are counted)")
    append_eod: bool = setting(True, "end each document with the tokenizer's end-of-document id")
    workers: int = setting(1, "processes that tokenise; 1: this one")
    resume: bool = setting(True, "go on from a run that was stopped; false: start again")
    overwrite: bool = setting(False, "replace a dataset that is there")
    chunk_bytes: int = setting(CHUNK_BYTES, "bytes of text that a process tokenises at a time")
    show_progress: bool = setting(True, "a bar on a terminal, lines otherwise")

    def __post_init__(self) -> None:
        check_choice("on_bad_line", self.on_bad_line, ("refuse", "skip"))
        check_range("workers", self.workers, 1)
        check_range("chunk_bytes", self.chunk_bytes, 1)


def prepare(
    inputs: Sequence[str | Path], tokenizer: str | Tokenizer, output: str | Path, config: PrepareConfig | None = None
) -> dict[str, Any]:
    """Tokenise text, jsonl or parquet files into OUTPUT.bin and .idx, with .domains.json, .manifest.json, .tokenizer.

    Returns the manifest. Raises DataError for an input that is missing, empty or not valid, or an output that exists.
    """
    config = config or PrepareConfig()
    paths = [Path(path) for path in inputs]
    if not paths:
        raise DataError("there is no input, must be one file or more")
    for path in paths:
        check_file(path)
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer, paths, config.key)
    job = _Job(paths, tokenizer, Path(output), config)
    if job.was_finished():
        _remove_partial(job)
        return read_manifest(job.prefix)
    job.check_output()
    try:
        _run(job)
    except OSError as error:
        raise DataError(f"cannot write {job.prefix}: {error.strerror or error}") from None
    finally:
        job.drop_partial_if_useless()
    return read_manifest(job.prefix)


def bad_lines(count: int) -> str:
    """The number of skipped lines in words."""
    return f"{count:,} bad line{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class _Job:
    inputs: list[Path]
    tokenizer: Tokenizer
    prefix: Path
    config: PrepareConfig

    @property
    def partial(self) -> Path:
        return beside(self.prefix, ".partial")

    @property
    def mark(self) -> Path:
        """Written once the new dataset is complete, before it takes its place."""
        return self.partial / "committed"

    @property
    def settings(self) -> str:
        """A hash of what decides every part, besides the text itself."""
        config = self.config
        fields = (config.key, config.domain_field, config.default_domain, config.on_bad_line, config.append_eod)
        return text_hash(FORMAT, self.tokenizer.fingerprint, *map(str, fields), *map(str, self.inputs))

    def was_finished(self) -> bool:
        """Whether a run of just this job was killed after its dataset was in place, before it tidied up."""
        index = beside(self.prefix, ".idx")
        if not (self.mark.is_file() and index.is_file()):
            return False
        return self.mark.read_text().split() == [self.settings, file_hash(index)]

    def check_output(self) -> None:
        """Refuse to replace a dataset, unless asked to; a lone .bin may be what a killed run left."""
        endings = (".idx",) if self.mark.is_file() else (".idx", ".bin")
        found = [beside(self.prefix, ending) for ending in endings if beside(self.prefix, ending).exists()]
        if found and not self.config.overwrite:
            raise DataError(f"{found[0]} exists; choose another output, or replace it with --overwrite")

    def tasks(self) -> Iterator[tuple[PartTask, int]]:
        """Every chunk in order, with the bytes of input read up to its end."""
        before, number = 0, 0
        for path in self.inputs:
            for chunk in iter_chunks(path, self.config.chunk_bytes):
                yield self._task(chunk, number), before + chunk.position
                number += 1
            before += path.stat().st_size

    def _task(self, chunk: Chunk, number: int) -> PartTask:
        to = self.partial / f"{number:08d}-{chunk_digest(chunk, self.settings)}.npz"
        return PartTask(chunk, self._read_config(chunk.path), self.config.append_eod, to)

    def _read_config(self, path: Path) -> ReadConfig:
        config = self.config
        domain = "text" if len(self.inputs) == 1 else path.name.partition(".")[0] or path.name
        return ReadConfig(
            text_key=config.key,
            domain_field=config.domain_field,
            on_bad_line=config.on_bad_line,
            default_domain=config.default_domain or domain,
        )

    def drop_partial_if_useless(self) -> None:
        """Leave nothing behind where no chunk was finished that a later run could use."""
        if self.partial.is_dir() and not any(self.partial.glob("*.npz")):
            shutil.rmtree(self.partial)


def _run(job: _Job) -> None:
    if not job.config.resume:
        shutil.rmtree(job.partial, ignore_errors=True)
    job.partial.mkdir(parents=True, exist_ok=True)
    job.tokenizer.save(job.partial / "tokenizer")
    joined = job.partial / "joined"
    total = sum(path.stat().st_size for path in job.inputs)
    with PreparedWriter(joined, job.tokenizer) as writer, FileProgress(total, job.config.show_progress) as progress:
        for path, position in _finished_parts(job):
            writer.add(load_part(path))
            progress.update(position, writer.num_documents)
        if not writer.num_documents:
            skipped = f"; skipped {bad_lines(len(writer.skipped))}, as {writer.skipped[0]}" if writer.skipped else ""
            raise DataError(f"{', '.join(map(str, job.inputs))} holds no document with text in it{skipped}")
    writer.write_sidecars([str(path) for path in job.inputs], job.config.append_eod)
    write_whole(job.mark, f"{job.settings} {file_hash(beside(joined, '.idx'))}\n".encode())
    move_dataset(joined, job.prefix)
    _remove_partial(job)


def _remove_partial(job: _Job) -> None:
    """The mark goes last: until then a later run can tell that this one was done."""
    for path in job.partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != job.mark:
            path.unlink()
    shutil.rmtree(job.partial)


def _finished_parts(job: _Job) -> Iterator[tuple[Path, int]]:
    """The file of each chunk's part, in order, as soon as it is there."""
    if job.config.workers == 1:
        for task, position in job.tasks():
            if not task.to.exists():
                save_part(tokenize(task, job.tokenizer), task.to)
            yield task.to, position
        return
    pool = ProcessPoolExecutor(
        job.config.workers,
        mp_context=get_context("spawn"),  # fork would copy the tokenizer library's threads half-way
        initializer=start_worker,
        initargs=(job.partial / "tokenizer",),
    )
    try:
        yield from _in_pool(pool, job)
    except BrokenProcessPool:
        raise DataError(
            f"one of {job.config.workers} workers was killed (out of memory?); the same command with fewer workers "
            "goes on from here"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_pool(pool: ProcessPoolExecutor, job: _Job) -> Iterator[tuple[Path, int]]:
    waiting: deque[tuple[Future[Path] | Path, int]] = deque()
    for task, position in job.tasks():
        waiting.append((task.to if task.to.exists() else pool.submit(work, task), position))
        if len(waiting) > 2 * job.config.workers:  # bounds the chunks in memory
            yield _wait(*waiting.popleft())
    while waiting:
        yield _wait(*waiting.popleft())


def _wait(part: Future[Path] | Path, position: int) -> tuple[Path, int]:
    return (part if isinstance(part, Path) else part.result()), position
