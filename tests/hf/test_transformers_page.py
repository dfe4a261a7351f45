"""The blocks of docs/how-to/transformers.md, executed as written, one after the other."""

import pytest

from tests.docs.conftest import blocks_in_order, run_page

pytestmark = [pytest.mark.heavy, pytest.mark.slow]
PAGE = "how-to/transformers.md"


def test_every_block_of_the_page_runs_as_written(tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert [language for language, _ in blocks_in_order(PAGE)] == ["sh", "python", "python", "python"]
    run_page(PAGE, tmp_path)
    assert (tmp_path / "trained" / "modeling_remoe.py").is_file()
