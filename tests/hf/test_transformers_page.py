"""The blocks of docs/how-to/transformers.md, executed as written, one after the other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.heavy, pytest.mark.slow]
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "transformers.md").read_text(encoding="utf-8")


def test_every_block_of_the_page_runs_as_written(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "HF_HUB_OFFLINE": "1"}
    blocks = re.findall(r"```(sh|python)\n(.*?)```", PAGE, flags=re.DOTALL)
    assert [language for language, _ in blocks] == ["sh", "python", "python", "python"]
    for language, code in blocks:
        command = ["sh", "-ec", code] if language == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, (code, done.stderr[-2000:])
    assert (tmp_path / "trained" / "modeling_remoe.py").is_file()
