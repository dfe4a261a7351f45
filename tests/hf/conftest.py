"""The small models of tests/model."""

import pytest

from tests.model.conftest import build, tokens_BS

pytest.importorskip("transformers", reason="transformers is not installed")

__all__ = ["build", "tokens_BS"]
