"""The blocks of the pages about conversion and the density dial, executed as written, one after the other."""

import pytest

from tests.docs.conftest import run_page

pytestmark = [pytest.mark.heavy, pytest.mark.slow]


@pytest.mark.parametrize(
    ("page", "results"),
    [
        ("density.md", ["runs/dial/density.json", "sparser/config.json"]),
        ("convert-a-checkpoint.md", ["runs/further/metrics.jsonl", "olmoe-trained/modeling_relu_moe.py"]),
    ],
)
def test_every_block_of_the_page_runs_as_written(page, results, tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    run_page(f"how-to/{page}", tmp_path)
    assert all((tmp_path / result).is_file() for result in results)
