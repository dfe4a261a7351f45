"""Rows of measurements: a file that is whole after each row, and tables."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from remoe.bench import machine
from remoe.errors import RemoeError

Row = dict[str, Any]
Show = Callable[[Row], None]


class MismatchError(RemoeError):
    """Candidates of a benchmark whose results differ from the reference."""

    exit_code = 1


class Results:
    """The rows of one benchmark, and what they were measured on."""

    def __init__(self, kind: str, path: Path | None = None, show: Show | None = None, **about: Any) -> None:
        self.rows: list[Row] = []
        self.about: dict[str, Any] = {"benchmark": kind, **machine.describe(), **about}
        self._path = path
        self._show = show

    def add(self, row: Row) -> None:
        """Keep a row, show it, and write the file anew: what was measured survives whatever comes next."""
        self.rows.append(row)
        if self._show is not None:
            self._show(row)
        self.write()

    def write(self) -> None:
        """Write the file, if one is wanted, beside and then over the old one."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_name(self._path.name + ".new")
        beside.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self._path)

    def check(self) -> None:
        """Raise MismatchError that names every result which is not what it should be."""
        wrong = [text for row in self.rows for text in row.get("mismatches", [])]
        if wrong:
            raise MismatchError("results differ: " + "; ".join(wrong))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {**self.about, "rows": [rounded(row) for row in self.rows]}


def first_line(error: Exception) -> str:
    """What a failed row says."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def rounded(row: Mapping[str, Any]) -> Row:
    """The row with five significant digits: more is noise in a clock."""
    return {key: _rounded(value) for key, value in row.items() if value is not None}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(inner) for inner in value]
    return value
