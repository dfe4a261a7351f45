"""A model as files: config.json and safetensors, sharded when large, checked when read."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from remoe.config import from_dict, to_dict
from remoe.errors import CheckpointError, ConfigError
from remoe.model.causal_lm import ReMoEForCausalLM
from remoe.model.config import ReMoEConfig

SCHEMA_VERSION = 1
_ADDED_LATER = ("block", "attention_span", "dropout", "thresholds")  # exports from before have the defaults
_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
Fill = Callable[[dict[str, Tensor]], None]


def save_model(
    model: ReMoEForCausalLM, folder: Path, max_shard_bytes: float = 5e9, fill: Fill | None = None
) -> None:  # fmt: skip
    """Write config.json and the weights into a folder; files of the same name are replaced, each in one go.

    More than `max_shard_bytes` of weights become several files and an index. `fill` gives tensors of a model on the
    meta device their values, by name and in place, one file's at a time: no more are in memory. Raises CheckpointError
    where the folder cannot be written.
    """
    folder = Path(folder)
    shards = _shards(model.state_dict(), max_shard_bytes)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file_name, tensors in shards.items():
            _write_shard(folder / file_name, tensors if fill is None else _filled(tensors, fill))
        _remove_stale(folder, set(shards))
        if len(shards) > 1:
            _write_json(folder / _INDEX, _index(shards))
        _write_json(folder / _CONFIG, _described(model.config))
    except OSError as error:
        raise CheckpointError(f"cannot write the model to {folder}: {error.strerror or error}") from error
    finally:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def load_model(folder: Path) -> ReMoEForCausalLM:
    """Read a saved model, in eval mode on the CPU, in the dtype it was saved in.

    Raises CheckpointError for a missing or damaged file, and for a tensor that is missing, left over, or of another
    shape than config.json says.
    """
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = ReMoEForCausalLM(config)
    missing = dict(model.state_dict())
    for path in _weight_files(folder):
        tensors = _read_shard(path)
        for name, tensor in tensors.items():
            _check_tensor(path, name, tensor, missing.pop(name, None), config)
        model.load_state_dict(tensors, strict=False, assign=True)
    if missing:
        raise CheckpointError(f"{folder} has no tensor {min(missing)!r} ({len(missing)} missing); save the model again")
    return model.eval()


def read_config(folder: Path) -> ReMoEConfig:
    """The model config in a folder's config.json."""
    path = Path(folder) / _CONFIG
    values = _read_json(path)
    version = values.get("schema_version", SCHEMA_VERSION)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise CheckpointError(f"{path} has schema_version {version}, must be at most {SCHEMA_VERSION}; update remoe")
    names = [field.name for field in fields(ReMoEConfig)]
    absent = [name for name in names if name not in values and name not in _ADDED_LATER]
    if absent:
        raise CheckpointError(f"{path} has no key {absent[0]!r}; it is not the config of a remoe model")
    try:
        return from_dict(ReMoEConfig, {name: values[name] for name in names if name in values})
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _filled(tensors: dict[str, Tensor], fill: Fill) -> dict[str, Tensor]:
    values = {name: torch.empty_like(tensor, device="cpu") for name, tensor in tensors.items()}
    fill(values)
    return values


def _described(config: ReMoEConfig) -> dict[str, Any]:
    heading = {"model_type": "remoe", "architectures": ["ReMoEForCausalLM"], "schema_version": SCHEMA_VERSION}
    return heading | to_dict(config)


def _remove_stale(folder: Path, written: set[str]) -> None:
    """An earlier save with another number of shards must not be read together with this one."""
    (folder / _INDEX).unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors"):
        if path.name not in written:
            path.unlink()


def _shards(tensors: dict[str, Tensor], max_shard_bytes: float) -> dict[str, dict[str, Tensor]]:
    """File name to tensors, in the model's order; a tensor is never split."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > max_shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, start=1)
    }


def _index(shards: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
    weight_map = {name: file_name for file_name, tensors in shards.items() for name in tensors}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "sha256": _checksum(tensors)}  # the format itself has no checksum
    try:
        with _replacing(path) as partial:
            partial.touch()
            mode = partial.stat().st_mode  # by the umask; save_file makes a file of its own that only its owner reads
            save_file(tensors, partial, metadata=metadata)
            partial.chmod(mode)
    except SafetensorError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with _replacing(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write to beside the file, which is replaced at the end; a failure leaves the old one."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # it may be a link to elsewhere
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _checksum(tensors: dict[str, Tensor]) -> str:
    """Of names, dtypes, shapes and values, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weight_files(folder: Path) -> Iterator[Path]:
    if not (folder / _INDEX).exists():
        yield folder / "model.safetensors"
        return
    weight_map = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder / _INDEX} has no weight_map; save the model again")
    for file_name in sorted({Path(str(value)).name for value in weight_map.values()}):  # beside it, never elsewhere
        yield folder / file_name


def _read_shard(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; the model's folder is not complete")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; save the model again or use another copy") from error
    if "sha256" in metadata and metadata["sha256"] != _checksum(tensors):
        raise CheckpointError(f"{path} is damaged: its checksum differs; save the model again or use another copy")
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a model's folder holds {_CONFIG} and *.safetensors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    return values


def _check_tensor(path: Path, name: str, tensor: Tensor, expected: Tensor | None, config: ReMoEConfig) -> None:
    if expected is None:
        raise CheckpointError(f"{path} has a tensor {name!r} that the model of {_CONFIG} does not have")
    if tensor.shape == expected.shape:
        return
    vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight") and tensor.shape[0] != config.vocab_size
    fix = f"; the vocabulary has {tensor.shape[0]} tokens there, {config.vocab_size} in {_CONFIG}" if vocabulary else ""
    raise CheckpointError(
        f"{path}: {name!r} has shape {list(tensor.shape)}, must be {list(expected.shape)} by {_CONFIG}{fix}"
    )
