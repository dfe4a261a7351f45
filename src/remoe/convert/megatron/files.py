"""The two layouts of a Megatron checkpoint on disk, each read into one model's whole tensors.

torch_dist (ReMoE's scripts): iter_N/{.metadata, *.distcp, common.pt}, tensors saved whole for any number of ranks.
torch: iter_N/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt, one file a rank.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from remoe.convert.megatron import inert
from remoe.convert.megatron.shards import Rank, Tensors, join
from remoe.errors import CheckpointError

COEFFICIENT = "moe_relu_l1_reg_coeff"
_TRACKER = "latest_checkpointed_iteration.txt"
_NOT_MODEL = ("optimizer.", "rng_state", "rerun_state_machine", "opt_param_scheduler", "chained_")
_NO_WEIGHTS = ("_extra_state", COEFFICIENT)
_STACKED_LAYERS = re.compile(r"decoder\.layers\.(?!\d+\.)(.+)")
_STACKED_EXPERTS = re.compile(r"(decoder\.layers\.\d+\.mlp\.experts\.)experts\.(linear_fc[12]\.weight)")
_CELL = "mlp.router.cell."
_RANK_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")


class MegatronCheckpoint(NamedTuple):
    """A model as it would be on one rank, the arguments it was trained with, and the rest that matters."""

    tensors: Tensors
    args: Mapping[str, Any]
    sparsity_coef: float | None
    iteration: int | None


def read(folder: Path) -> MegatronCheckpoint:
    """The checkpoint in a folder, or the latest one below it; nothing in it is run.

    Raises CheckpointError where there is none, or where it is damaged or not complete.
    """
    folder = _iteration_folder(Path(folder))
    if (folder / ".metadata").is_file():
        return _read_torch_dist(folder)
    files = sorted(folder.glob("mp_rank_*/model_optim_rng.pt"))
    if not files:
        raise CheckpointError(
            f"{folder} holds neither .metadata (Megatron's torch_dist format) nor mp_rank_*/model_optim_rng.pt (torch)"
        )
    return _read_ranks(files)


def _iteration_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; name that of a Megatron checkpoint, such as iter_0060000")
    tracker = folder / _TRACKER
    if not tracker.is_file():
        return folder
    text = tracker.read_text(encoding="utf-8").strip()
    return folder / (f"iter_{int(text):07d}" if text.isdigit() else "release")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        with path.open("rb") as file:
            found = inert.load_metadata(file, path)
        return found


def _read_torch_dist(folder: Path) -> MegatronCheckpoint:
    common = inert.load(folder / "common.pt") if (folder / "common.pt").is_file() else {}
    reader = _Reader(folder)
    entries = reader.read_metadata().state_dict_metadata
    stored: Tensors = {}
    for name, entry in entries.items():
        if isinstance(entry, TensorStorageMetadata) and not name.startswith(_NOT_MODEL):
            stored[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        elif not name.startswith(_NOT_MODEL) and not any(part in name for part in _NO_WEIGHTS):
            raise CheckpointError(f"{folder} has {name!r}, which is not a tensor and has no place in a remoe model")
    try:
        dcp.load(dict(stored), storage_reader=reader, no_dist=True)
    except (dcp.CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder} is damaged or not complete: {str(error).strip().splitlines()[-1]}") from error
    coefficient = stored.pop(COEFFICIENT, None)
    if coefficient is None:
        coefficient = _model_chunks(common)[0].get(COEFFICIENT) if "model" in common or "model0" in common else None
    return _checkpoint(_unstacked(stored), common, coefficient)


def _unstacked(stored: Tensors) -> Tensors:
    """Layers, where they were stacked, and experts one by one, named as on one rank."""
    layers = (part for name, tensor in stored.items() for part in _layers_of(name, tensor))
    return dict(part for name, tensor in layers for part in _experts_of(name, tensor))


def _layers_of(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    stacked = _STACKED_LAYERS.fullmatch(name)
    if stacked is None:
        yield name, tensor
    elif stacked[1].startswith(_CELL):  # one for all layers
        yield f"decoder.layers.0.{stacked[1]}", tensor
    else:
        yield from ((f"decoder.layers.{layer}.{stacked[1]}", part) for layer, part in enumerate(tensor.unbind()))


def _experts_of(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    stacked = _STACKED_EXPERTS.fullmatch(name)
    if stacked is None:
        yield name, tensor
    else:
        yield from ((f"{stacked[1]}local_experts.{n}.{stacked[2]}", matrix) for n, matrix in enumerate(tensor.unbind()))


def _read_ranks(files: list[Path]) -> MegatronCheckpoint:
    content = {path: inert.load(path) for path in files}
    first = content[files[0]]
    args = _arguments(first)
    expert_tensor = args.get("expert_tensor_parallel_size") or args.get("tensor_model_parallel_size")
    if expert_tensor != args.get("tensor_model_parallel_size"):
        raise CheckpointError(
            f"{files[0]} was saved with expert_tensor_parallel_size {expert_tensor}, must be that of the other layers"
        )
    parts = {
        _rank_of(path, args): [
            {name: tensor for name, tensor in chunk.items() if not any(part in name for part in _NO_WEIGHTS)}
            for chunk in _model_chunks(content[path])
        ]
        for path in files
    }
    _check_all_ranks(parts, args, files[0].parents[1])
    return _checkpoint(join(parts), first, _model_chunks(first)[0].get(COEFFICIENT))


def _rank_of(path: Path, args: Mapping[str, Any]) -> Rank:
    numbers = _RANK_FOLDER.fullmatch(path.parent.name)
    if numbers is None:
        raise CheckpointError(f"{path.parent} is not the folder of a rank, such as mp_rank_00 or mp_rank_00_000")
    tensor, second, third = numbers.groups()
    if third is not None:
        return Rank(int(tensor), int(second), int(third))
    is_pipeline = (args.get("pipeline_model_parallel_size") or 1) > 1
    return Rank(int(tensor), *((int(second or 0), 0) if is_pipeline else (0, int(second or 0))))


def _check_all_ranks(parts: Mapping[Rank, Any], args: Mapping[str, Any], folder: Path) -> None:
    keys = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
    num_ranks = 1
    for key in keys:
        num_ranks *= args.get(key) or 1
    if len(parts) != num_ranks:
        raise CheckpointError(f"{folder} has the files of {len(parts)} ranks, must have {num_ranks}; copy all of them")


def _model_chunks(content: Mapping[str, Any]) -> list[Mapping[str, Tensor]]:
    chunks = [content[name] for name in _chunk_names(content)]
    if not chunks:
        raise CheckpointError("the checkpoint holds no 'model'; it is not one of Megatron's")
    return chunks


def _chunk_names(content: Mapping[str, Any]) -> Iterator[str]:
    if "model" in content:
        yield "model"
        return
    number = 0
    while f"model{number}" in content:
        yield f"model{number}"
        number += 1


def _checkpoint(tensors: Tensors, content: Mapping[str, Any], coefficient: Any) -> MegatronCheckpoint:
    value = None if coefficient is None else float(coefficient)
    return MegatronCheckpoint(tensors, _arguments(content), value, content.get("iteration"))


def _arguments(content: Mapping[str, Any]) -> Mapping[str, Any]:
    args = content.get("args")
    return {} if args is None else vars(args)
