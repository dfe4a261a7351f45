"""Checkpoints written by one number of processes in one layout and read by another: cases_checkpoint.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import WORKER
from tests.distributed.processes import forked

pytestmark = pytest.mark.xdist_group("distributed")


def run(folder: Path, num_processes: int, *cases: str) -> list[dict[str, Any]]:
    """What the cases returned, rank by rank; the last one's."""
    output = folder.parent / "results.json"
    finished = forked(num_processes, str(WORKER), str(output), *cases, timeout=900, FOLDER=str(folder))
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(output.read_text())[cases[-1]]


def check(everyone: list[dict[str, float]], written: int, read: int) -> None:
    """Each layout was read from each, without a difference."""
    for differences in everyone:
        assert len(differences) == written * read
        assert {name: value for name, value in differences.items() if value != 0.0} == {}


def test_one_or_two_processes_read_what_one_or_two_wrote_in_any_layout(tmp_path: Path):
    folder = tmp_path / "saved"
    folder.mkdir()
    run(folder, 1, "save")
    check(run(folder, 2, "save", "load"), written=8, read=7)
    check(run(folder, 1, "load"), written=8, read=1)


def test_a_full_disk_of_one_process_is_told_on_all_and_the_older_checkpoint_stays(tmp_path: Path):
    folder = tmp_path / "saved"
    folder.mkdir()
    (said, left), (said_by_other, _) = run(folder, 2, "full_disk")
    assert said.startswith("No space left on device; the last complete one is")
    assert said_by_other.startswith("No space left on device; the last complete one is")
    assert left == ["step_00000002"], "the first process cleans up"


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_four_processes_read_what_two_wrote_and_the_other_way_round(tmp_path: Path):
    folder = tmp_path / "saved"
    folder.mkdir()
    run(folder, 2, "save")
    check(run(folder, 4, "save", "load"), written=19, read=12)
    check(run(folder, 2, "load"), written=19, read=7)
    check(run(folder, 1, "load"), written=19, read=1)
