"""The constants of a machine: each a number with where it comes from, a measurement or an assumption."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

ASSUMED = "assumed"


@dataclass(frozen=True)
class Constant:
    """A number with its unit; `source` is a file of results and what of it, or `assumed: ` and why."""

    value: float
    unit: str
    source: str

    @property
    def is_assumed(self) -> bool:
        """Whether nobody measured it for this project."""
        return self.source.startswith(ASSUMED)


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind in hosts of `gpus_per_host`, which a network joins."""

    name: str
    constants: dict[str, Constant]

    def __getitem__(self, key: str) -> float:
        return self.constants[key].value

    @property
    def assumptions(self) -> dict[str, Constant]:
        """The constants that were not measured."""
        return {key: constant for key, constant in self.constants.items() if constant.is_assumed}

    def near(self, size: int, stride: int) -> int:
        """How many of a group's GPUs share a host; neighbours in the group are `stride` ranks apart."""
        return max(1, min(size, int(self["gpus_per_host"]) // stride))

    def gather_seconds(self, num_bytes: float, size: int, stride: int = 1) -> float:
        """All-gather or reduce-scatter: each GPU gets (sends) so many bytes; a host's GPUs use their links together."""
        if size == 1:
            return 0.0
        near = self.near(size, stride)
        rate = self["host_link"] if near == size else min(self["host_link"], near * self["network_link"])
        return num_bytes / rate

    def exchange_seconds(self, num_bytes: float, size: int, stride: int = 1) -> float:
        """All-to-all: each GPU sends so many bytes, in equal parts to the others; those of other hosts by its own."""
        if size == 1:
            return 0.0
        far = (size - self.near(size, stride)) / (size - 1)
        return max(num_bytes * (1 - far) / self["host_link"], num_bytes * far / self["network_link"])

    def pass_seconds(self, num_bytes: float, size: int, stride: int) -> float:
        """From each of a row of GPUs to the next, so many bytes; the slowest link counts."""
        if size == 1:
            return 0.0
        return num_bytes / self["host_link" if self.near(size, stride) == size else "network_link"]


@functools.cache
def machine() -> Machine:
    """The machine that plans are made for: machine.json beside this file, written by benchmarks/plan_constants.py."""
    return machine_of(
        json.loads(resources.files("remoe.distributed.planning").joinpath("machine.json").read_text(encoding="utf-8"))
    )


def machine_of(values: Mapping[str, Any]) -> Machine:
    """A machine from plain values, as machine.json has them."""
    return Machine(values["name"], {key: Constant(**entry) for key, entry in values["constants"].items()})
