"""Machines that leave a run and join it: two torchrun agents on this machine, of which one goes and another comes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tools.torchrun_workers import workers_of

from remoe.config import to_yaml
from remoe.training import TrainConfig, train
from remoe.training.run import Run
from tests.distributed.processes import free_port
from tests.training.conftest import config, text  # noqa: F401

PATIENCE_SECONDS = 180
STEPS, CHECKPOINT_INTERVAL = 150, 5

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("distributed")]


def start_agent(port: int, path: Path, root: Path) -> subprocess.Popen[bytes]:
    """torchrun on one of one or two machines."""
    launcher = ["--nnodes=1:2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    launcher += ["--rdzv-id=elastic", "--max-restarts=9", "--rdzv-conf=last_call_timeout=2"]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "remoe", "train", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as in examples/launch/kubernetes-pytorchjob.yaml
    with (root / "log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--root", str(root), "--no-report", "--resume"], env=environment, stdout=log, stderr=log
        )


def wait_for_step(run: Path, step: int, root: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (run / "metrics.jsonl").exists() or Run(run, TrainConfig()).step < step:
        assert time.monotonic() < deadline, (root / "log").read_text()[-3000:]
        time.sleep(0.1)


def ranks_of_checkpoints(run: Path) -> int:
    """How many processes wrote the newest checkpoint: each has a shard of its own."""
    newest = sorted((run / "checkpoints").glob("step_????????"))[-1]
    return len(list(newest.glob("shard-*")))


def test_a_run_goes_on_without_a_machine_and_again_with_a_new_one(
    config: Callable[..., TrainConfig], tmp_path: Path  # noqa: F811
):  # fmt: skip
    sizes = {"hidden_size": 64, "num_layers": 4, "intermediate_size": 64}
    loop = {"batch_size": 16, "steps": STEPS, "checkpoint_interval": CHECKPOINT_INTERVAL, "validation_interval": STEPS}
    built = config(
        model=sizes,
        data={"sequence_length": 64},
        optimizer={"lr": 1e-3},
        train=loop | {"flip_interval": 0},
        parallel={"timeout": 30.0},
    )
    (tmp_path / "config.yaml").write_text(to_yaml(built))
    port = free_port()
    run, agents = tmp_path / "small", []
    try:
        agents += [start_agent(port, tmp_path / "config.yaml", tmp_path)]
        time.sleep(1)  # the first one hosts the meeting place
        agents += [start_agent(port, tmp_path / "config.yaml", tmp_path)]
        wait_for_step(run, 2 * CHECKPOINT_INTERVAL, tmp_path)
        shards = [ranks_of_checkpoints(run)]
        for process in [agents[1].pid, *workers_of(agents[1]).values()]:
            os.kill(process, signal.SIGKILL)
        wait_for_step(run, Run(run, built).step + 2 * CHECKPOINT_INTERVAL, tmp_path)
        shards += [ranks_of_checkpoints(run)]
        agents += [start_agent(port, tmp_path / "config.yaml", tmp_path)]
        assert agents[0].wait(2 * PATIENCE_SECONDS) == 0, (tmp_path / "log").read_text()[-3000:]
        assert agents[2].wait(PATIENCE_SECONDS) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        for agent in agents:
            agent.kill()
    assert [*shards, ranks_of_checkpoints(run)] == [2, 1, 2], "two machines, one, and two again"
    whole = train(built, root=tmp_path / "whole").metrics()
    found_lines = Run.open(run).metrics()
    assert [line["step"] for line in found_lines] == list(range(1, STEPS + 1))
    for ours, theirs in zip(found_lines, whole, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=1e-3), ours["step"]
