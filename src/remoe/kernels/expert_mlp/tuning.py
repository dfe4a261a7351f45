"""What there is to choose for the Triton path, for `remoe bench tune`."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from remoe.errors import ConfigError
from remoe.kernels.expert_mlp import tiles
from remoe.kernels.expert_mlp.tiles import COPIED, GATHERED, GROUPED_MM, TABLE, Sizes

_FUSED = (
    "128x128x64 w8 s3 g8", "128x128x64 w8 s4 g8", "128x128x64 w8 s4 g16", "128x64x64 w4 s3 g8", "128x64x64 w8 s4 g8",
    "64x128x64 w4 s3 g8",
)  # fmt: skip
_PLAIN = (
    "128x256x64 w8 s3 g8", "128x256x64 w8 s4 g8", "256x128x64 w8 s3 g8", "128x128x64 w8 s3 g8", "128x128x64 w8 s4 g8",
    "128x128x64 w4 s3 g8", "128x256x64 w8 s3 g16", "64x256x64 w4 s3 g8",
)  # fmt: skip
_CANDIDATES = {
    "rows": (GATHERED, COPIED),
    "swiglu": _FUSED,
    "down": (GROUPED_MM, *_PLAIN),
    "grad_act": (GROUPED_MM, *_PLAIN),
    "grad_down": (GROUPED_MM, *_PLAIN),
    "grad_up": (GROUPED_MM, *_PLAIN),
    "grad_x": (GROUPED_MM, *_PLAIN),
}


def parts(shape: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> dict[str, list[str]]:
    """The choices of each part, today's first. Raises ConfigError where the Triton path does not run."""
    if device.type != "cuda":
        raise ConfigError(f"--device is {device.type}, must be cuda: only the kernels of GPUs have choices")
    today = tiles.words_of(_sizes(shape), dtype)
    return {part: list(dict.fromkeys((today[part], *choices))) for part, choices in _CANDIDATES.items()}


def forced(part: str, choice: str) -> AbstractContextManager[None]:
    """Inside, the op runs `part` with this choice."""
    return tiles.forced(part, choice)


def save(rows: Sequence[Mapping[str, Any]], path: Path | None) -> Path:
    """Write the table that the op reads; rows of other shapes that are in it stay."""
    path = path or TABLE
    kept: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    new: list[dict[str, Any]] = [
        {"device": row["device"], "shape": row["shape"]}
        | {"sizes": _sizes(row["sizes"])._asdict(), "choices": row["best"]}
        for row in rows
    ]
    names = {row["shape"] for row in new}
    table = {"rows": [row for row in kept if row["shape"] not in names] + new}
    path.write_text(json.dumps(table, indent=1) + "\n")
    return path


def _sizes(shape: Mapping[str, int]) -> Sizes:
    rows = shape["num_tokens"] * shape["top_k"] / shape["num_experts"]
    return Sizes(shape["hidden_size"], shape["expert_size"], shape["num_experts"], rows)
