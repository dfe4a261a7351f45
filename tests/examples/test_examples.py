"""Each script of examples/ runs from start to end, with sizes that take seconds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes.conftest import TINY

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def output_of(script: str, folder: Path, *arguments: str) -> str:
    """What a script prints; it runs in an empty folder and must succeed."""
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout


@pytest.fixture(name="tiny")
def _tiny(tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Line {i} of a text, {i * i} is its square." for i in range(200)), encoding="utf-8")
    return [*TINY, f"data.train={text}", f"data.cache={tmp_path / 'cache'}"]


def test_every_script_is_tested():
    tested = set(re.findall(r'output_of\("(\w+\.py)"', Path(__file__).read_text(encoding="utf-8")))
    assert {script.name for script in EXAMPLES.glob("*.py")} == tested


def test_the_layer_in_a_model_of_your_own_learns(tmp_path: Path):
    lines = output_of("moe_layer.py", tmp_path, "51").splitlines()
    losses = [float(re.search(r"loss ([\d.]+)", line)[1]) for line in lines]  # type: ignore[index]
    assert len(losses) == 2
    assert losses[-1] < 3.0  # from ln 256 = 5.5


@pytest.mark.slow
def test_two_routers_are_compared(tmp_path: Path, tiny: list[str]):
    printed = output_of("compare_routers.py", tmp_path, *tiny)
    assert re.search(r"minus topk: [+-][\d.]+ \(95 %: [+-][\d.]+ to [+-][\d.]+\)", printed)
    assert (tmp_path / "runs" / "two-routers" / "report.html").is_file()


def test_a_model_is_trained_loaded_and_looked_at(tmp_path: Path, tiny: list[str]):
    printed = output_of("train_and_load.py", tmp_path, *tiny)
    assert "validation loss" in printed
    assert len(re.findall(r"experts a layer", printed)) == 44
