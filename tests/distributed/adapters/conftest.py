"""These files import Megatron or torchtitan when they are collected, which takes seconds: not for the quick tests."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if "not heavy" in config.option.markexpr else None
