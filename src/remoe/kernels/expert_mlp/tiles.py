"""How a layer's products are run: tile sizes, or torch's grouped product, by a table measured on GPUs.

`remoe bench tune` writes the table (tuned.json). A shape that it lacks takes the nearest one's row.
"""

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).with_name("tuned.json")
GROUPED_MM = "grouped_mm"
GATHERED, COPIED = "gathered", "copied"


class Tiles(NamedTuple):
    """The shape of one program of a matrix product, written as in 128x256x64 w8 s3 g8."""

    m: int
    n: int
    """A quarter of it is 16 bytes at least: weight gradients are written by quarters."""
    k: int
    warps: int
    stages: int
    group_m: int = 8
    """Row tiles that use one column tile in turn, while it is in the cache."""

    @classmethod
    def parsed(cls, text: str) -> "Tiles":
        """From the written form."""
        shape, warps, stages, group_m = text.split()
        m, n, k = (int(size) for size in shape.split("x"))
        return cls(m, n, k, int(warps[1:]), int(stages[1:]), int(group_m[1:]))

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k} w{self.warps} s{self.stages} g{self.group_m}"

    def constants(self, dtype: torch.dtype) -> dict[str, int | str]:
        """The launch arguments that every product kernel takes. fp32 inputs are multiplied as fp32, not tf32."""
        return {
            "BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "GROUP_M": self.group_m,
            "num_warps": self.warps, "num_stages": self.stages,
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        }  # fmt: skip


class Sizes(NamedTuple):
    """What a shape class is made of."""

    hidden_size: int
    expert_size: int
    num_experts: int
    rows_per_expert: float

    def distance(self, other: "Sizes") -> float:
        """In doublings: 0 for the same class."""
        pairs = zip(self, other, strict=True)
        return sum(abs(log2(max(1.0, a)) - log2(max(1.0, b))) for a, b in pairs)


@dataclass(frozen=True)
class Choices:
    """How each product of a layer is run; None: torch's grouped product."""

    swiglu: Tiles
    down: Tiles | None
    grad_act: Tiles | None
    grad_down: Tiles | None
    grad_up: Tiles | None
    grad_x: Tiles | None
    copies_rows: bool
    """Copy a product's rows first (N*H*4 bytes, faster products) rather than gather them inside."""


_PRODUCTS = ("swiglu", "down", "grad_act", "grad_down", "grad_up", "grad_x")
_FP32 = dict.fromkeys(_PRODUCTS, "64x64x32 w4 s2 g8") | {"rows": GATHERED}
_FEW_ROWS = dict.fromkeys(_PRODUCTS, "16x64x64 w4 s4 g8") | {"rows": GATHERED}
_FEW = 16
IN_PLACE_OF_GROUPED_MM = Tiles(128, 256, 64, 8, 3)
"""Where the table says torch's grouped product, and it cannot be: for other types than bf16, or to add to a sum."""
_forced: dict[str, str] = {}


def choose(sizes: Sizes, dtype: torch.dtype) -> Choices:
    """The choices of a shape class."""
    return _parsed(tuple((words_of(sizes, dtype) | _forced).items()))


def words_of(sizes: Sizes, dtype: torch.dtype) -> dict[str, str]:
    """The same, each in its written form, by part."""
    if dtype == torch.float32:
        return _FP32
    if sizes.rows_per_expert <= _FEW:
        return _FEW_ROWS
    words = dict(_nearest_row(sizes))
    if dtype != torch.bfloat16:  # the only type of torch's grouped product on a GPU
        words = {part: str(IN_PLACE_OF_GROUPED_MM) if word == GROUPED_MM else word for part, word in words.items()}
    return words


@contextmanager
def forced(part: str, choice: str) -> Generator[None]:
    """Inside, the op runs `part` with this choice."""
    before = _forced.get(part)
    _forced[part] = choice
    try:
        yield
    finally:
        if before is None:
            del _forced[part]
        else:
            _forced[part] = before


@lru_cache(maxsize=4096)  # asked twice a layer; with exact rows the sizes differ from step to step
def _nearest_row(sizes: Sizes) -> Mapping[str, str]:
    table = _table()
    return table[min(table, key=sizes.distance)]


@cache
def _table() -> Mapping[Sizes, Mapping[str, str]]:
    rows: list[dict[str, Any]] = json.loads(TABLE.read_text())["rows"]
    return {Sizes(**row["sizes"]): row["choices"] for row in rows}


@cache
def _parsed(words: tuple[tuple[str, str], ...]) -> Choices:
    by_part = dict(words)
    copies_rows = by_part.pop("rows") == COPIED
    tiles = {part: None if word == GROUPED_MM else Tiles.parsed(word) for part, word in by_part.items()}
    return Choices(**tiles, copies_rows=copies_rows)  # pyright: ignore[reportArgumentType]
