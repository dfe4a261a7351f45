"""Small corpora for the data tests."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from remoe.data import DataConfig

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def write_rows(tmp_path) -> Callable[..., Path]:
    """Write documents of given domains as jsonl."""

    def write(name: str, texts: Sequence[str], domains: Sequence[str] = ()) -> Path:
        rows = [{"text": text} for text in texts]
        for row, domain in zip(rows, domains, strict=False):
            row["meta"] = {"pile_set_name": domain}  # type: ignore[assignment]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def data_config(tmp_path) -> Callable[..., DataConfig]:
    """A config whose cache is the test's own folder."""

    def make(**settings) -> DataConfig:
        return DataConfig(**{"cache": tmp_path / "cache", "sequence_length": 16} | settings)

    return make


@pytest.fixture
def shared() -> Path:
    """The folder of real corpora beside the project."""
    if not SHARED.is_dir():
        pytest.skip("the real corpora are not beside this checkout")
    return SHARED
