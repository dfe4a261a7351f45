"""How a layer's products are run: by Triton or QuACK in tiles, or by torch, by a table measured on GPUs.

`remoe bench tune` writes the table (tuned.json). A shape that it lacks takes the nearest one's row.
"""

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from math import log2
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

TABLE = Path(__file__).with_name("tuned.json")
GROUPED_MM, QUACK = "grouped_mm", "quack"
GATHERED, COPIED = "gathered", "copied"
Quack = Literal["never", "where faster", "always"]
"""Which products are QuACK's: where faster, by the table."""


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


class QuackTiles(NamedTuple):
    """The same of a QuACK product, written as in quack 128x192 c2 pingpong."""

    m: int
    n: int
    cluster: int
    """Programs along the rows that share what they read of the other side."""
    is_pingpong: bool
    """Whether two tiles are at work at a time, one in its products while the other is written."""

    @classmethod
    def parsed(cls, text: str) -> "QuackTiles":
        """From the written form."""
        _, shape, cluster, *pingpong = text.split()
        m, n = (int(size) for size in shape.split("x"))
        return cls(m, n, int(cluster[1:]), bool(pingpong))

    def __str__(self) -> str:
        return f"{QUACK} {self.m}x{self.n} c{self.cluster}" + self.is_pingpong * " pingpong"


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

    swiglu: Tiles | QuackTiles
    down: Tiles | QuackTiles | None
    grad_act: Tiles | QuackTiles | None
    grad_down: Tiles | QuackTiles | None
    grad_up: Tiles | QuackTiles | None
    grad_x: Tiles | QuackTiles | None
    copies_rows: bool
    """Copy a product's rows first (N*H*4 bytes, faster products) rather than gather them inside."""

    @property
    def reads_starts(self) -> bool:
        """Whether a product reads where experts' rows begin in int32: QuACK's and torch's do."""
        return not all(isinstance(getattr(self, part), Tiles) for part in _PRODUCTS)

    @property
    def interleaves(self) -> bool:
        """Whether kept pre-activations are gate, up, gate, up … of a row, not its gates and then its ups."""
        return isinstance(self.swiglu, QuackTiles)


_PRODUCTS = ("swiglu", "down", "grad_act", "grad_down", "grad_up", "grad_x")
_FP32 = dict.fromkeys(_PRODUCTS, "64x64x32 w4 s2 g8") | {"rows": GATHERED}
_FEW_ROWS = dict.fromkeys(_PRODUCTS, "16x64x64 w4 s4 g8") | {"rows": GATHERED}
_QUACK = dict.fromkeys(_PRODUCTS, "quack 128x192 c1 pingpong")
_FEW = 16
IN_PLACE_OF_GROUPED_MM = Tiles(128, 256, 64, 8, 3)
"""Where the table says torch's grouped product, and it cannot be: for other types than bf16, or to add to a sum."""
_forced: dict[str, str] = {}


def choose(sizes: Sizes, dtype: torch.dtype, quack: Quack = "never") -> Choices:
    """The choices of a shape class."""
    return _parsed(tuple((words_of(sizes, dtype, quack) | _forced).items()))


def words_of(sizes: Sizes, dtype: torch.dtype, quack: Quack = "never") -> dict[str, str]:
    """The same, each in its written form, by part."""
    if dtype == torch.float32:
        return _FP32
    has_few_rows = sizes.rows_per_expert <= _FEW
    row = {"choices": _FEW_ROWS} if has_few_rows else _nearest_row(sizes)
    words = dict(row["choices"])
    if dtype != torch.bfloat16:  # the only type of torch's grouped product on a GPU
        words = {part: str(IN_PLACE_OF_GROUPED_MM) if word == GROUPED_MM else word for part, word in words.items()}
    if quack == "always":
        words |= _QUACK
    if quack != "never":
        words |= row.get(QUACK, {})
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
def _nearest_row(sizes: Sizes) -> Mapping[str, Mapping[str, str]]:
    """`choices`, and `quack`: what takes their place where QuACK is at hand."""
    table = _table()
    return table[min(table, key=sizes.distance)]


@cache
def _table() -> Mapping[Sizes, Mapping[str, Mapping[str, str]]]:
    rows: list[dict[str, Any]] = json.loads(TABLE.read_text())["rows"]
    return {Sizes(**row["sizes"]): row for row in rows}


@cache
def _parsed(words: tuple[tuple[str, str], ...]) -> Choices:
    by_part = dict(words)
    copies_rows = by_part.pop("rows") == COPIED
    tiles = {part: _tiles(word) for part, word in by_part.items()}
    return Choices(**tiles, copies_rows=copies_rows)  # pyright: ignore[reportArgumentType]


def _tiles(word: str) -> Tiles | QuackTiles | None:
    if word == GROUPED_MM:
        return None
    return QuackTiles.parsed(word) if word.startswith(QUACK) else Tiles.parsed(word)
