"""The commands of docs/how-to/scale-out.md, executed as written, one after the other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from remoe.training.run import Run

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "scale-out.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
def test_every_command_of_the_page_runs_as_written(tmp_path: Path):
    commands = "".join(re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)).splitlines()
    assert len(commands) == 10
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands:
        finished = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert finished.returncode == 0, (command, finished.stderr[-2000:])
    assert Run.open(tmp_path / "runs" / "two").step == 10
    assert (tmp_path / "exported" / "model.safetensors").is_file()
