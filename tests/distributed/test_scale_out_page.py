"""The commands of docs/how-to/scale-out.md, executed as written, one after the other."""

from pathlib import Path

import pytest

from remoe.training.run import Run
from tests.docs.conftest import blocks, run_line


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
def test_every_command_of_the_page_runs_as_written(tmp_path: Path):
    commands = "".join(blocks("how-to/scale-out.md", "sh")).splitlines()
    assert len(commands) == 10
    for command in commands:
        run_line(command, tmp_path)
    assert Run.open(tmp_path / "runs" / "two").step == 10
    assert (tmp_path / "exported" / "model.safetensors").is_file()
