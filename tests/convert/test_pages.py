"""The blocks of the pages about conversion and the density dial, executed as written, one after the other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.heavy, pytest.mark.slow]
PAGES = Path(__file__).resolve().parents[2] / "docs" / "how-to"


@pytest.mark.parametrize(
    ("page", "results"),
    [
        ("density.md", ["runs/dial/density.json", "sparser/config.json"]),
        ("convert-a-checkpoint.md", ["runs/further/metrics.jsonl", "olmoe-trained/modeling_relu_moe.py"]),
    ],
)
def test_every_block_of_the_page_runs_as_written(page, results, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    text = (PAGES / page).read_text(encoding="utf-8")
    for language, code in re.findall(r"```(sh|python)\n(.*?)```", text, flags=re.DOTALL):
        command = ["sh", "-ec", code] if language == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, (code, done.stderr[-2000:])
    assert all((tmp_path / result).is_file() for result in results)
