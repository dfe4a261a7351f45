"""Checkpoints that one number of processes writes and another reads, in any two layouts."""

import errno
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from remoe.config import from_dict
from remoe.distributed import launch
from remoe.distributed.config import ParallelConfig, resolve_parallel
from remoe.distributed.ranks import Ranks
from remoe.distributed.world import world_size
from remoe.errors import NoRoomError
from remoe.model import ReMoEForCausalLM
from remoe.training import TrainConfig, checkpoint
from remoe.training.saving import CheckpointSaver, Kept
from remoe.training.step import Stepper

SIZES = {
    "hidden_size": 12,
    "num_heads": 4,
    "head_size": 4,
    "num_kv_heads": 2,
    "num_layers": 2,
    "intermediate_size": 8,
    "num_experts": 4,
}
"""Sizes of which some are no multiple of the number of ranks."""


def tensors(seed: int, **parallel: Any) -> tuple[Ranks, dict[str, Tensor]]:
    """Everything a run saves, spread over all processes: weights, Adam's state, the coefficient, by the seed."""
    ranks = joined(resolve_parallel(ParallelConfig(**parallel), world_size()))
    model = {"vocab_size": 33, "router": "recurrent_relu", **SIZES}
    config = from_dict(TrainConfig, {"model": model, "train": {"batch_size": 8, "device": "cpu"}})
    whole_model = ReMoEForCausalLM(config.model, seed=seed)
    values = {name: parameter.detach() * 2 for name, parameter in whole_model.named_parameters()}
    found = Stepper(config, whole_model, torch.device("cpu"), ranks).tensors()
    for name, value in values.items():
        if f"optimizer.{name}.exp_avg" in found:  # a stage has some of the layers only
            fill(found[f"optimizer.{name}.exp_avg"], value)
    found["sparsity.log_coef"].fill_(seed)
    return ranks, found


@cache
def joined(parallel: ParallelConfig) -> Ranks:
    """The ranks of a layout: each has groups of its own, which cost time."""
    return launch.join(parallel, torch.device("cpu"))


def fill(target: Tensor, value: Tensor) -> None:
    """Set a tensor, or this rank's part of it."""
    if not isinstance(target, DTensor):
        target.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    target.to_local().copy_(distribute_tensor(value, target.device_mesh, target.placements).to_local())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


LAYOUTS: dict[str, dict[str, Any]] = {
    "shards": {},
    "experts": {"expert": 2},
    "copies": {"data_replicate": 2},
    "heads": {"tensor": 2},
    "stages": {"pipeline": 2},
    "optimizer": {"sharded": "optimizer"},
    "optimizer and experts": {"sharded": "optimizer", "expert": 2},
}
WITH_FOUR: dict[str, dict[str, Any]] = {
    "copies with experts": {"data_replicate": 2, "expert": 2},
    "all experts": {"expert": 4},
    "heads with experts": {"tensor": 2, "expert": 4},
    "stages with experts": {"pipeline": 2, "expert": 2},
    "optimizer of copies with experts": {"sharded": "optimizer", "data_replicate": 2, "expert": 2},
}


def layouts() -> dict[str, dict[str, Any]]:
    """Those that this number of processes can have, by name."""
    size = world_size()
    return {"one process": {}} if size == 1 else LAYOUTS if size == 2 else LAYOUTS | WITH_FOUR


def save() -> None:
    """Write the values of seed 1 in each layout; they change as soon as training could go on."""
    for name, parallel in layouts().items():
        ranks, values = tensors(1, **parallel)
        folder = Path(os.environ["FOLDER"]) / f"{world_size()} {name}"
        with CheckpointSaver(folder, ranks, print) as saver:
            saver.save(values, {"step": 3, "config": {}}, Kept(1, None))
            for value in values.values():
                local = value.detach()
                (local.to_local() if isinstance(local, DTensor) else local).zero_()


def full_disk() -> list[Any]:
    """What each rank says where the last one's disk is full, and what there is then."""
    ranks, values = tensors(1)
    folder = Path(os.environ["FOLDER"]) / "full"
    original = os.fsync
    with CheckpointSaver(folder, ranks, print) as saver:
        saver.save(values, {"step": 1, "config": {}}, Kept(1, None), wait=True)
        saver.save(values, {"step": 2, "config": {}}, Kept(1, None))
        saver.wait()
        os.fsync = fail if ranks.index == ranks.size - 1 else original
        saver.save(values, {"step": 3, "config": {}}, Kept(1, None))
        try:
            saver.wait()
        except NoRoomError as error:
            return [str(error).split("could not be written: ")[1], sorted(path.name for path in folder.iterdir())]
        finally:
            os.fsync = original
    return []


def fail(file: int) -> None:
    """A full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def load() -> dict[str, float]:
    """Read what there is into models of another seed; the largest difference from the values of seed 1."""
    differences = {}
    for name, parallel in layouts().items():
        expected = tensors(1, **parallel)[1]
        for folder in sorted(Path(os.environ["FOLDER"]).iterdir()):
            values = tensors(2, **parallel)[1]
            checkpoint.read(folder / "step_00000003").load(values)
            pairs = [(whole(values[key]), whole(expected[key])) for key in expected]
            differences[f"{folder.name} -> {name}"] = max((a - b).abs().max().item() for a, b in pairs)
    return differences


CASES: dict[str, Callable[[], Any]] = {"save": save, "load": load, "full_disk": full_disk}
