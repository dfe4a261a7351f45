"""What there is to choose for the fused path, for `remoe bench tune`."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from remoe.errors import ConfigError
from remoe.kernels.expert_mlp import tiles
from remoe.kernels.expert_mlp.backends import has_quack
from remoe.kernels.expert_mlp.tiles import COPIED, GATHERED, GROUPED_MM, QUACK, TABLE, Sizes

_FUSED = (
    "128x128x64 w8 s3 g8", "128x128x64 w8 s4 g8", "128x128x64 w8 s4 g16", "128x64x64 w4 s3 g8", "128x64x64 w8 s4 g8",
    "64x128x64 w4 s3 g8",
)  # fmt: skip
_PLAIN = (
    "128x256x64 w8 s3 g8", "128x256x64 w8 s4 g8", "256x128x64 w8 s3 g8", "128x128x64 w8 s3 g8", "128x128x64 w8 s4 g8",
    "128x128x64 w4 s3 g8", "128x256x64 w8 s3 g16", "64x256x64 w4 s3 g8",
)  # fmt: skip
_QUACK = tuple(
    f"{QUACK} {tiles}"
    for tiles in ("128x192 c2 pingpong", "128x192 c1 pingpong", "128x128 c1 pingpong", "128x256 c2", "128x256 c1")
)
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
    """The choices of each part, today's first: QuACK's and the one without it, or ours and torch's where it is missing.

    Raises ConfigError where the fused path does not run.
    """
    if device.type != "cuda":
        raise ConfigError(f"--device is {device.type}, must be cuda: only the kernels of GPUs have choices")
    sizes = _sizes(shape)
    without = tiles.words_of(sizes, dtype)
    today, candidates = without, _CANDIDATES
    if has_quack(device):
        today = tiles.words_of(sizes, dtype, "where faster")
        candidates = {part: (*_QUACK, without[part]) for part in _CANDIDATES} | {"rows": _CANDIDATES["rows"]}
    return {part: list(dict.fromkeys((today[part], *choices))) for part, choices in candidates.items()}


def forced(part: str, choice: str) -> AbstractContextManager[None]:
    """Inside, the op runs `part` with this choice."""
    return tiles.forced(part, choice)


def save(rows: Sequence[Mapping[str, Any]], path: Path | None) -> Path:
    """Write the table that the op reads; rows of other shapes that are in it stay."""
    path = path or TABLE
    kept: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    table = {row["shape"]: row for row in kept}
    for row in rows:
        table[row["shape"]] = _merged(table.get(row["shape"]), row)
    path.write_text(json.dumps({"rows": list(table.values())}, indent=1) + "\n")
    return path


def _merged(before: Mapping[str, Any] | None, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table: what was found with QuACK at hand stands beside what there was found without."""
    about = {"device": row["device"], "shape": row["shape"], "sizes": _sizes(row["sizes"])._asdict()}
    tried = [word for times in row["tried"].values() for word in times]
    if not any(word.startswith(QUACK) for word in tried):
        with_quack = {QUACK: before[QUACK]} if before and QUACK in before else {}
        return about | {"choices": row["best"]} | with_quack
    without = before["choices"] if before else tiles.words_of(_sizes(row["sizes"]), torch.bfloat16)
    with_quack = {part: word for part, word in row["best"].items() if word != without[part]}
    return about | {"choices": without, QUACK: with_quack}


def _sizes(shape: Mapping[str, int]) -> Sizes:
    rows = shape["num_tokens"] * shape["top_k"] / shape["num_experts"]
    return Sizes(shape["hidden_size"], shape["expert_size"], shape["num_experts"], rows)
