"""metrics.jsonl: one JSON object a logged step, appended at once; the source of truth about a run."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from remoe.errors import CheckpointError, NoRoomError

Metrics = dict[str, Any]
LATE_SHARE = 0.25
"""A run's own numbers are taken over this last part of its steps: past the dense start, compilation and caches."""


class MetricsFile:
    """The metrics of a run on disk. NaN and infinity are written as null."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one line: a killed process loses at most the line it was writing. NoRoomError on a full disk."""
        rest = memoryview(json.dumps(finite(metrics), allow_nan=False).encode() + b"\n")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise NoRoomError(
                f"{self.path} could not be written: {error.strerror}; make room and go on with --resume"
            ) from error

    def sync(self) -> None:
        """Make all lines survive a power cut; before a checkpoint that relies on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class NoMetricsFile(MetricsFile):
    """Of a rank that is not the first: nothing is written."""

    def __init__(self) -> None:
        """There is no file."""

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Forget the line."""

    def sync(self) -> None:
        """There is nothing to keep."""

    def close(self) -> None:
        """There is nothing to close."""


def read_metrics(path: Path) -> list[Metrics]:
    """All complete lines of a metrics file; empty where there is none. The last line may be half written.

    Raises CheckpointError, naming the line, where one is not what a run writes.
    """
    return [metrics for _, metrics in _complete_lines(path)]


def late_values(rows: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    """What the lines of the last quarter of the steps say of one metric; those that did not measure it left out."""
    start = (1 - LATE_SHARE) * rows[-1]["step"] if rows else 0
    return [row[key] for row in rows if row["step"] > start and row.get(key) is not None]


def last_value(rows: Sequence[Mapping[str, Any]], key: str, default: Any) -> Any:
    """What was last measured of one metric; the default where nothing was."""
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), default)


def cut_back(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a half-written last one; the file is replaced in one go."""
    if not path.exists():
        return
    kept = [line for line, metrics in _complete_lines(path) if metrics["step"] <= step]
    partial = path.with_suffix(".tmp")
    partial.unlink(missing_ok=True)  # it may be a link to elsewhere
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def finite(value: Any) -> Any:
    """The value with each NaN and infinity replaced by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _complete_lines(path: Path) -> Iterator[tuple[str, Metrics]]:
    """Each line as it stands, and what it says."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                yield line[:-1], _parse(path, number, line)


def _parse(path: Path, number: int, line: str) -> Metrics:
    try:
        metrics = json.loads(line)
    except (ValueError, RecursionError):
        metrics = None
    if not isinstance(metrics, dict) or not _is_logged(metrics):
        raise CheckpointError(f"{path}:{number} is damaged, must be one JSON object with a step; remove the line")
    return metrics


def _is_logged(metrics: Metrics) -> bool:
    """Whether what every look at a run needs is there, as numbers."""
    counts, loss = (metrics.get("step"), metrics.get("tokens", 0)), metrics.get("valid_loss")
    return all(type(count) is int for count in counts) and (loss is None or type(loss) in (int, float))
