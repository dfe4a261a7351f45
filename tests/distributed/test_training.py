"""`remoe train` on several processes: one run, whatever their number."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tools.torchrun_workers import workers_of

import remoe
from remoe.config import to_yaml
from remoe.training import TrainConfig, train
from remoe.training.run import Run
from tests.distributed.conftest import torchrun
from tests.distributed.processes import forked
from tests.training.conftest import batch, config, numbers, text  # noqa: F401

pytestmark = pytest.mark.xdist_group("distributed")
CONSTANT = {"schedule": "constant"}
"""A learning rate that does not depend on the number of steps."""
Start = Callable[..., subprocess.CompletedProcess[str]]
COMPARED = ("loss", "lm_loss", "grad_norm", "sparsity_l1", "valid_loss", "sparsity_coef")


def write_config(folder: Path, built: TrainConfig) -> str:
    path = folder / "config.yaml"
    path.write_text(to_yaml(built))
    return str(path)


def remoe_train(
    num_processes: int, path: str, root: Path, *more: str, start: Start = forked
) -> subprocess.CompletedProcess[str]:
    return start(num_processes, "-m", "remoe", "train", path, "--root", str(root), "--no-report", *more)


def start_training(num_processes: int, path: str, root: Path, *launcher: str) -> subprocess.Popen[str]:
    """The same in the background, going on with what is there."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes), *launcher]
    command += ["-m", "remoe", "train", path, "--root", str(root), "--no-report", "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, *command], env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_steps(metrics: Path, steps: int) -> None:
    deadline = time.monotonic() + 40
    while not (metrics.exists() and metrics.read_text().count("\n") >= steps):
        assert time.monotonic() < deadline, "training did not begin"
        time.sleep(0.1)


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Equal counts, and losses within rounding."""
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["sparsity"] == theirs["sparsity"]
        assert ours.get("valid_loss_per_domain", {}).keys() == theirs.get("valid_loss_per_domain", {}).keys()
        for key in COMPARED:
            if theirs.get(key) is not None:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (key, theirs["step"])


def test_a_run_of_two_processes_is_that_of_one_and_either_goes_on_with_the_other(
    config: Callable[..., TrainConfig], tmp_path: Path  # noqa: F811
):  # fmt: skip
    built = config(parallel={"expert": 2}, optimizer=CONSTANT)
    one = train(config(optimizer=CONSTANT), root=tmp_path / "one")
    path = write_config(tmp_path, built)
    finished = remoe_train(2, path, tmp_path / "two")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("validation loss") == 1, "one process speaks for all"
    two = Run.open(tmp_path / "two" / "small")
    assert_close(two.metrics(), one.metrics())
    assert two.config.parallel == built.parallel, "data_shard: auto stays auto, for other numbers of processes"

    longer = config(train={"steps": 8}, optimizer=CONSTANT)
    on_one = train(longer, root=tmp_path / "two", resume=True)
    again = remoe_train(2, path, tmp_path / "one", "--resume", "--set", "train.steps=8")
    assert again.returncode == 0, again.stderr
    whole = train(longer, root=tmp_path / "whole").metrics()
    assert_close(on_one.metrics()[6:], whole[6:])
    assert_close(Run.open(tmp_path / "one" / "small").metrics()[6:], whole[6:])


@pytest.mark.parametrize("key", ["tensor", "context", "pipeline"])
def test_ranks_that_share_sequences_or_layers_train_and_validate_as_one_process(
    config: Callable[..., TrainConfig], tmp_path: Path, key: str  # noqa: F811
):  # fmt: skip
    settings = {"model": {"num_kv_heads": 2}, "data": {"document_mask": True}, "optimizer": CONSTANT}
    settings["train"] = {"micro_batch_size": 2}  # the L1 term is weighed by the loads of a micro-batch
    one = train(config(**settings), root=tmp_path / "one")
    path = write_config(tmp_path, config(**settings, parallel={key: 2}))
    finished = remoe_train(2, path, tmp_path / "two")
    assert finished.returncode == 0, finished.stderr
    two = Run.open(tmp_path / "two" / "small").metrics()
    assert_close(two, one.metrics())
    flips = [
        (ours["flip_rate"], theirs["flip_rate"])
        for ours, theirs in zip(two, one.metrics(), strict=True)
        if "flip_rate" in theirs
    ]
    assert flips
    assert all(ours == pytest.approx(theirs, abs=1e-3) for ours, theirs in flips)


@pytest.mark.slow
def test_stages_make_the_hash_tables_of_their_own_layers_from_the_text(
    config: Callable[..., TrainConfig], tmp_path: Path  # noqa: F811
):  # fmt: skip
    """Token ids are needed in every stage, and each layer has a table of its own."""
    router = {"name": "hash", "table": "balanced", "per_layer": True}
    settings = {"model": {"router": router}, "optimizer": CONSTANT, "train": {"micro_batch_size": 2}}
    one = train(config(**settings), root=tmp_path / "one")
    finished = remoe_train(2, write_config(tmp_path, config(**settings, parallel={"pipeline": 2})), tmp_path / "two")
    assert finished.returncode == 0, finished.stderr
    assert_close(Run.open(tmp_path / "two" / "small").metrics(), one.metrics())
    alone, stages = (remoe.load(tmp_path / name / "small").state_dict() for name in ("one", "two"))
    tables = [name for name in alone if name.endswith("table")]
    assert len(tables) > 1
    assert all(torch.equal(stages[name], alone[name]) for name in tables)
    assert not torch.equal(alone[tables[0]], alone[tables[-1]]), "layers differ"


def test_the_same_layout_gives_the_same_bits_and_goes_on_with_them(
    config: Callable[..., TrainConfig], numbers: Callable[..., Any], tmp_path: Path  # noqa: F811
):  # fmt: skip
    built = config(model={"router": "sparsemixer"}, optimizer=CONSTANT)  # it draws noise
    path = write_config(tmp_path, built)
    assert remoe_train(2, path, tmp_path / "first").returncode == 0
    assert remoe_train(2, path, tmp_path / "second", "--set", "train.steps=3").returncode == 0
    assert remoe_train(2, path, tmp_path / "second", "--resume", "--set", "train.steps=6").returncode == 0
    first, second = (numbers(Run.open(tmp_path / name / "small").metrics()) for name in ("first", "second"))
    assert [line["loss"] for line in first] == [line["loss"] for line in second]


def test_sigterm_ends_all_processes_after_a_checkpoint(
    config: Callable[..., TrainConfig], tmp_path: Path  # noqa: F811
):  # fmt: skip
    path = write_config(tmp_path, config(train={"steps": 100000, "checkpoint_interval": 100000, "flip_interval": 0}))
    process, metrics = start_training(2, path, tmp_path), tmp_path / "small" / "metrics.jsonl"
    wait_for_steps(metrics, 3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert errors.count("was stopped by SIGTERM after step") == 1
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert (tmp_path / "small" / "checkpoints" / f"step_{last:08d}").is_dir()


@pytest.mark.parametrize("layout", [{}, {"pipeline": 2}], ids=["shards", "pipeline"])
def test_a_process_that_hangs_is_named(
    config: Callable[..., TrainConfig], tmp_path: Path, layout: dict[str, int]  # noqa: F811
):  # fmt: skip
    settings = {"steps": 100000, "checkpoint_interval": 100000, "flip_interval": 0}
    path = write_config(tmp_path, config(train=settings, parallel={"timeout": 3.0} | layout))
    process, metrics = start_training(2, path, tmp_path), tmp_path / "small" / "metrics.jsonl"
    wait_for_steps(metrics, 3)
    stopped = workers_of(process)[1]
    os.kill(stopped, signal.SIGSTOP)
    said = ""
    try:
        assert process.stderr is not None
        for line in process.stderr:
            said += line
            if line.startswith("remoe: "):
                break
    finally:
        os.kill(stopped, signal.SIGKILL)
    _, rest = process.communicate(timeout=30)
    assert process.returncode != 0
    assert (said + rest).count("process 1 of 2 did not answer any more") == 1


def test_a_run_whose_process_is_killed_goes_on_by_itself_with_the_same_bits(
    config: Callable[..., TrainConfig], numbers: Callable[..., Any], tmp_path: Path  # noqa: F811
):  # fmt: skip
    path = write_config(tmp_path, config(train={"steps": 60, "checkpoint_interval": 3, "validation_interval": 60}))
    whole = remoe_train(2, path, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    process = start_training(2, path, tmp_path / "killed", "--max-restarts", "2")
    wait_for_steps(tmp_path / "killed" / "small" / "metrics.jsonl", 8)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors[-4000:]
    killed, expected = (Run.open(tmp_path / name / "small").metrics() for name in ("killed", "whole"))
    assert numbers(killed) == numbers(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["parallel.data_shard=4"], "parallel.data_replicate is 1, times data_shard = 4 it must be the number of"),
        (["train.batch_size=3"], "train.batch_size is 3, must be a multiple of the 2 data ranks"),
        (["parallel.pipeline=2", "train.micro_batch_size=4"], "must be at least parallel.pipeline = 2, or stages"),
        (["model.router=lory", "parallel.expert=2"], "parallel.expert is 2, must be 1 for a router that merges"),
    ],
)
def test_a_mistake_is_said_once_and_nothing_is_written(
    config: Callable[..., TrainConfig], tmp_path: Path, changes: list[str], message: str  # noqa: F811
):  # fmt: skip
    finished = remoe_train(2, write_config(tmp_path, config()), tmp_path / "runs", "--set", *changes)
    assert finished.returncode != 0
    said = [line for line in finished.stderr.splitlines() if line.startswith("remoe: ")]
    assert len(said) == 1
    assert message in said[0]
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "runs").exists()


def test_torchrun_ends_with_a_traceback_of_its_own_after_the_mistake(
    config: Callable[..., TrainConfig], tmp_path: Path  # noqa: F811
):  # fmt: skip
    path = write_config(tmp_path, config())
    finished = remoe_train(2, path, tmp_path / "runs", "--set", "train.batch_size=3", start=torchrun)
    assert finished.returncode == 1
    before, _, after = finished.stderr.partition("Traceback (most recent call last)")
    assert "remoe: train.batch_size is 3" in before, "docs/how-to/scale-out.md says how to read it"
    assert "exitcode  : 2 " in after.partition("Root Cause")[2]
    assert "remoe/training" not in finished.stderr
