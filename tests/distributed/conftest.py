"""Runs worker.py on several processes, once for all the tests that look at its results."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import forked

WORKER = Path(__file__).parent / "worker.py"
Results = dict[str, Any]


def torchrun(
    num_processes: int, *command: str, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND` on so many processes of this machine, one thread each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return subprocess.run(
        [sys.executable, *launcher, *command],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
        check=False,
    )


@pytest.fixture(scope="session")
def results_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Results]:
    """`results_of(2, "case", …)`: what each case of worker.py returned on two processes, started once."""
    done: dict[tuple[Any, ...], Results] = {}

    def run(num_processes: int, *cases: str, timeout: float = 280) -> Results:
        key = (num_processes, *cases)
        if key not in done:
            output = tmp_path_factory.mktemp("worker") / "results.json"
            command = (str(WORKER), str(output), *cases)
            finished = forked(num_processes, *command, timeout=timeout, FOLDER=str(output.parent))
            assert finished.returncode == 0, finished.stderr[-4000:]
            done[key] = json.loads(output.read_text())
        return done[key]

    return run
