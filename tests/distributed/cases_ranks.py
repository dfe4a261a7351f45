"""What the trainer asks of its ranks."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from remoe.distributed.config import ParallelConfig, resolve_parallel
from remoe.distributed.data_ranks import DataRanks
from remoe.distributed.world import world_size
from remoe.errors import ConfigError


def ranks(**sizes: Any) -> DataRanks:
    """The ranks of a run on all processes."""
    return DataRanks(resolve_parallel(ParallelConfig(**sizes), world_size()), torch.device("cpu"))


def sums() -> dict[str, Any]:
    """Sums of an integer that no float holds, of a float, and of a vector."""
    own = ranks()
    big = torch.tensor(2**53 + own.index)
    values = {"big": big, "half": torch.tensor(0.5), "vector": torch.arange(3) * (own.index + 1)}
    return {name: value.tolist() for name, value in own.total(values).items()}


def agreement() -> list[int]:
    """A sum and a maximum on the host, the second of a signal that the last rank alone got."""
    own = ranks()
    return [own.total_number(10 + own.index), own.largest_number(15 if own.index == own.size - 1 else 0)]


def shares() -> list[list[Any]]:
    """What each rank evaluates of three batches."""
    return [list(share) for share in ranks().share_out(["first", "second", "third"])]


def in_turn() -> list[Any]:
    """What each rank finds when its turn comes: the first one's file."""
    own, place = ranks(), Path(os.environ["FOLDER"]) / "left behind"

    def act() -> bool:
        found = place.exists()
        if own.is_first:
            place.touch()
        return found

    return [own.in_turn(act), own.gather(own.index)]


def seeds() -> list[float]:
    """A number that is drawn after seeding a step, twice, and after seeding the next one."""
    own, drawn = ranks(), []
    for step in (3, 3, 4):
        own.seed_step(0, step)
        drawn.append(torch.rand(()).item())
    return drawn


def rows() -> list[list[int]]:
    """Rows of a batch of 8 in micro-batches of 2 a rank."""
    return [list(range(8))[part] for part in ranks().rows(8, 2)]


def first_alone() -> list[Any]:
    """An action's result, its mistake, and on which rank it ran."""
    own, ran = ranks(), []

    def act() -> str:
        ran.append(own.index)
        return "result"

    def fail() -> None:
        raise ConfigError("key is wrong")

    result = own.on_first(act)
    try:
        own.on_first(fail)
    except ConfigError as error:
        return [result, str(error), ran]
    return [result, None, ran]


CASES: dict[str, Callable[[], Any]] = {
    "sums": sums, "agreement": agreement, "shares": shares, "in_turn": in_turn, "seeds": seeds,
    "rows": rows, "first_alone": first_alone,
}  # fmt: skip
