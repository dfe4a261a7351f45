"""A trained model from wherever it was left: a run, a checkpoint, or an export."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from remoe.config import from_dict
from remoe.errors import CheckpointError, RemoeWarning
from remoe.model import ReMoEForCausalLM
from remoe.model.weights import load_model
from remoe.training import checkpoint
from remoe.training.checkpoint import Checkpoint
from remoe.training.config import TrainConfig
from remoe.training.run import CHECKPOINTS, is_run
from remoe.training.step import model_tensors


def load(path: Path | str) -> ReMoEForCausalLM:
    """The model in eval mode on the CPU. `path` is a run (its newest whole checkpoint), a checkpoint or an export.

    Raises CheckpointError where there is none, or where a checkpoint is damaged.
    """
    path = Path(path)
    if is_export(path):
        return load_model(path)
    return load_checkpoint(find_checkpoint(path))


def is_export(path: Path) -> bool:
    """Whether a folder is an export rather than a run or a checkpoint."""
    return (path / "config.json").is_file() and not is_run(path)


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest whole one of the run there; warns where newer ones are damaged."""
    if (path / checkpoint.RECORD).is_file() or (path / checkpoint.MANIFEST).is_file():
        return checkpoint.read(path)
    if not is_run(path):
        raise CheckpointError(f"{path} is not a run, a checkpoint or an export; `remoe runs` lists the runs")
    found, damaged = checkpoint.newest(path / CHECKPOINTS)
    if found is None:
        raise CheckpointError(f"run {path} has no checkpoint yet; train it with --resume")
    for error in damaged:
        warnings.warn(f"{error}; using {found.path.name}", RemoeWarning, stacklevel=3)
    return found


def config_of(found: Checkpoint) -> TrainConfig:
    """The resolved config that a checkpoint was trained with."""
    return from_dict(TrainConfig, found.record["config"])


def load_checkpoint(found: Checkpoint) -> ReMoEForCausalLM:
    """The checkpoint's model in eval mode on the CPU."""
    model = outline(found).to_empty(device="cpu")
    found.load(model_tensors(model))
    return model


def outline(found: Checkpoint) -> ReMoEForCausalLM:
    """The checkpoint's model in eval mode without its weights, on the meta device; `fill` reads some of them."""
    with torch.device("meta"):
        return ReMoEForCausalLM(config_of(found).model).eval()


def fill(found: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
    """Read tensors of the model in place, by their names in it: only these are in memory, whoever wrote the rest."""
    found.load({f"model.{name}": tensor for name, tensor in tensors.items()})
