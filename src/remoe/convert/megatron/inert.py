"""Reads pickled files without running anything in them: whatever is not a tensor or plain data becomes a stand-in."""

import dataclasses
import enum
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import filesystem, metadata

from remoe.errors import CheckpointError


class StandIn:
    """In place of an object of a class that was not imported; what it was built from is in its attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.built_from = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def load(path: Path) -> Any:
    """What torch.save wrote, on the CPU; CheckpointError for a file that is damaged or does more than hold data."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins: list[Any] = [(_stand_in(name), name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # an optimizer need not be read
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, AttributeError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as tensors and plain data: {_first_line(error)}") from error


class MetadataUnpickler(pickle.Unpickler):
    """Of the index of a torch.distributed.checkpoint, which has classes of that package and torch's dtypes only."""

    def find_class(self, module: str, name: str) -> Any:
        """The class where it is a record of those modules' own, else a stand-in: nothing else is imported or called."""
        for known in (metadata, filesystem):
            record = getattr(known, name, None) if module == known.__name__ else None
            if isinstance(record, type) and record.__module__ == module and _is_record(record):
                return record
        value = getattr(torch, name, None) if module == "torch" else None
        if value is torch.Size or isinstance(value, (torch.dtype, torch.layout)):
            return value
        return _stand_in(f"{module}.{name}")


def load_metadata(file: BinaryIO, path: Path) -> metadata.Metadata:
    """The index in `.metadata`; CheckpointError for anything else."""
    try:
        found = MetadataUnpickler(file).load()
    except (pickle.UnpicklingError, ValueError, TypeError, AttributeError, EOFError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path} cannot be read as an index: {_first_line(error)}") from error
    if not isinstance(found, metadata.Metadata):
        raise CheckpointError(f"{path} is not the index of a torch.distributed.checkpoint")
    return found


def _is_record(cls: type) -> bool:
    return dataclasses.is_dataclass(cls) or issubclass(cls, enum.Enum)


def _stand_in(name: str) -> type[StandIn]:
    return type(name.rpartition(".")[2], (StandIn,), {})


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
