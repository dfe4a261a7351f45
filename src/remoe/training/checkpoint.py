"""Checkpoints: tensors in safetensors files, everything else in JSON, a manifest with checksums written last.

The tensor files are those of torch.distributed.checkpoint's Hugging Face writer: each names the offsets of what it
holds, so that one process or many can write and any number can read; and unlike the default writer's, reading them
never unpickles anything. A checkpoint is written to `step_N.tmp` and renamed when complete.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from remoe.distributed.ranks import Ranks
from remoe.errors import CheckpointError, NoRoomError

SCHEMA = 1
MANIFEST = "manifest.json"
RECORD = "training.json"
MAX_FILE_BYTES = 2 * 1024**3
"""Tensors are split over files of about this size; one file is held in memory while it is written."""

UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""By schema version: turns the record (training.json) of that version into one of the next."""


class Checkpoint(NamedTuple):
    """A complete checkpoint whose checksums hold."""

    path: Path
    record: dict[str, Any]
    """What is not a tensor: step, config, best validation, …; of the current schema."""

    @property
    def step(self) -> int:
        """Optimizer steps that went into it."""
        return self.record["step"]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill these tensors in place from the checkpoint; it may hold more. CheckpointError where one does not fit."""
        import torch.distributed.checkpoint as dcp

        if not self.path.is_dir():
            raise _removed(self.path)
        try:
            with _own_errors(), torch.no_grad():
                dcp.load(dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(self.path)), no_dist=True)
        except (OSError, AssertionError) as error:  # torch asserts that it found something, and can read it
            if not self.path.is_dir():
                raise _removed(self.path) from error
            if isinstance(error, OSError):
                raise
            raise CheckpointError(f"checkpoint {self.path} is damaged: {error}") from error
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"checkpoint {self.path} does not fit this model: {error}") from error


def write(
    folder: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any], ranks: Ranks | None = None
) -> Checkpoint:
    """Write `folder`/step_N for N = record["step"]; it appears there only when complete. All ranks call this.

    A DTensor is written by the ranks that hold its parts, a plain tensor (equal on all) by one of them. Raises
    NoRoomError on all ranks where the disk of one is full or fails; what was there before is untouched then.
    """
    ranks = ranks or Ranks()
    final = folder / f"step_{record['step']:08d}"
    partial = final.with_suffix(".tmp")
    try:
        ranks.on_first(lambda: _begin(partial))
        _write_tensors(partial, tensors, ranks)
        files = ranks.gather(_entries(partial, ranks))
        ranks.on_first(lambda: _complete(partial, final, record, files))
    except OSError as error:
        if ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise _storage_error(error, final) from error
    return Checkpoint(final, dict(record))


def read(path: Path) -> Checkpoint:
    """Check a checkpoint's files against its manifest. CheckpointError names what is missing or damaged."""
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist")
    manifest = _read_json(path / MANIFEST)
    if manifest.pop("sha256", None) != _digest(json.dumps(manifest).encode()):
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} does not match its own checksum")
    if manifest["schema"] > SCHEMA:
        raise NewerSchemaError(
            f"checkpoint {path} has schema {manifest['schema']}, this version of remoe reads up to {SCHEMA}; "
            "update remoe"
        )
    _check_names(path, manifest["files"])
    for name, entry in manifest["files"].items():
        _check_file(path / name, entry)
    record = _read_json(path / RECORD)
    for schema in range(manifest["schema"], SCHEMA):
        record = UPGRADES[schema](record)
    return Checkpoint(path, record)


def newest(folder: Path) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest checkpoint whose checksums hold, and what is wrong with those newer than it.

    Raises CheckpointError where there are checkpoints but none is whole.
    """
    errors: list[CheckpointError] = []
    for path in reversed(paths(folder)):
        try:
            return read(path), errors
        except NewerSchemaError:
            raise
        except CheckpointError as error:
            if not path.exists():  # pruned by the run that is being trained: there is a newer one
                return newest(folder)
            errors.append(error)
    if errors:
        raise CheckpointError(f"no checkpoint in {folder} can be used; {errors[0]}")
    return None, errors


def paths(folder: Path) -> list[Path]:
    """Finished checkpoints of a folder, oldest first; their content is not looked at."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir())


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the one of `best_step`."""
    for path in paths(folder)[:-keep]:
        if step_of(path) != best_step:
            partial = path.with_suffix(".tmp")
            path.rename(partial)  # gone in one go: who looks never sees half of one
            _remove(partial)


def _remove(path: Path) -> None:
    """A folder with all in it; of a link to one only the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def set_aside_newer(folder: Path, step: int) -> None:
    """Rename the (damaged) checkpoints after `step`, so that they never count as the newest again."""
    for path in paths(folder):
        if step_of(path) > step:
            aside = path.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for path in folder.glob("step_*.tmp"):
        _remove(path)


class NewerSchemaError(CheckpointError):
    """A checkpoint of a later version of remoe: nothing is wrong with it, so there is no falling back from it."""


def _begin(partial: Path) -> None:
    remove_partial(partial.parent)
    partial.mkdir(parents=True)


def _complete(partial: Path, final: Path, record: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> None:
    _write_json(partial / RECORD, record)
    entries = {name: entry for part in files for name, entry in part.items()} | {RECORD: _entry(partial / RECORD)}
    _write_json(partial / MANIFEST, _manifest(dict(sorted(entries.items()))))
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(final.parent)


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    import torch.distributed.checkpoint as dcp

    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    writer = dcp.HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=_files(whole, ranks), save_distributed=True, enable_consolidation=False
    )
    with _own_errors(), _current_device_of(whole):
        dcp.save(whole, storage_writer=writer, process_group=ranks.group, no_dist=ranks.size == 1)


def _current_device_of(tensors: Mapping[str, Tensor]) -> AbstractContextManager[object]:
    """Make the tensors' GPU the current one: the writer waits for its copies on the current GPU's stream alone, so
    tensors of another GPU would be written before they arrive.
    """
    gpus = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    assert len(gpus) <= 1, f"one process writes the tensors of one GPU, not of {sorted(map(str, gpus))}"
    return torch.cuda.device(gpus.pop()) if gpus else nullcontext()


def _files(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, int]:
    """Which file, counted from 1, each tensor of all ranks goes to."""
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    if ranks.pipeline is not None:  # torch asks the first rank, which has some of the layers only
        sizes = {name: size for own in ranks.gather(sizes) for name, size in own.items()}
    files, index, filled = {}, 1, 0
    for name, size in sizes.items():
        if filled and filled + size > MAX_FILE_BYTES:
            index, filled = index + 1, 0
        files[name] = index
        filled += size
    return files


@contextmanager
def _own_errors() -> Iterator[None]:
    """Silence torch's notice of running without a process group, and unwrap what it wraps once for each rank."""
    from torch.distributed.checkpoint import CheckpointException

    # for good: the list of filters is the process's, and this may be a thread beside others
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _entries(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """The manifest's entries of the files that this rank wrote: their names begin with its number, from 1."""
    return {path.name: _entry(path) for path in folder.glob(f"shard-{ranks.index + 1:05d}-*")}


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _file_digest(path)}


def _manifest(files: Mapping[str, Any]) -> dict[str, Any]:
    manifest = {"schema": SCHEMA, "files": files}
    return manifest | {"sha256": _digest(json.dumps(manifest).encode())}


def _check_names(path: Path, files: Mapping[str, Any]) -> None:
    """The files beside the manifest, all of them and nothing elsewhere: torch reads every shard that it finds."""
    elsewhere = [name for name in files if name != Path(name).name]
    unlisted = sorted({file.name for file in path.glob("*.safetensors")} - files.keys())
    if elsewhere:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} names {elsewhere[0]!r}, must be a file in it")
    if unlisted:
        raise CheckpointError(f"checkpoint {path} is damaged: {unlisted[0]} is not in its {MANIFEST}; remove the file")


def _check_file(path: Path, entry: Mapping[str, Any]) -> None:
    where = f"checkpoint {path.parent} is damaged: {path.name}"
    if not path.is_file():
        raise CheckpointError(f"{where} is missing")
    try:
        size, digest = path.stat().st_size, _file_digest(path)
    except FileNotFoundError as error:
        raise _removed(path.parent) from error
    if size != entry["bytes"]:
        raise CheckpointError(f"{where} has {size} bytes, not {entry['bytes']}")
    if digest != entry["sha256"]:
        raise CheckpointError(f"{where} does not match its checksum")


def _removed(path: Path) -> CheckpointError:
    return CheckpointError(f"checkpoint {path} was removed while it was read; if its run is going on, try again")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path.parent} is not complete: {path.name} is missing") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"checkpoint {path.parent} is damaged: {path.name} is not JSON") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"checkpoint {path.parent} is damaged: {path.name} is not a JSON object")
    return values


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storage_error(error: OSError, path: Path) -> NoRoomError:
    last = paths(path.parent)
    kept = f"the last complete one is {last[-1]}" if last else "there is no earlier one"
    return NoRoomError(
        f"checkpoint {path} could not be written: {error.strerror or error}; {kept}; make room and go on with --resume"
    )
