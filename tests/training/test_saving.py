"""Checkpoints that are written while training goes on."""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from remoe.distributed.ranks import Ranks
from remoe.errors import NoRoomError, TrainingError
from remoe.training import TrainConfig, checkpoint, train
from remoe.training.saving import CheckpointSaver, Kept
from remoe.training.signals import RunStoppedError
from remoe.training.step import Stepper

PATIENCE_SECONDS = 20
ALL = Kept(newest=100, best_step=None)


class SlowDisk:
    """Writes of tensors begin only once they are let; those that fail do so then."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.began: list[str] = []
        self.failing: set[str] = set()
        self._write = checkpoint._write_tensors

    def write(self, folder: Path, *rest: object) -> None:
        self.began.append(folder.name)
        assert self.may_go_on.wait(PATIENCE_SECONDS), "nobody let the disk go on: training waited for it"
        if folder.name in self.failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._write(folder, *rest)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    slow = SlowDisk()
    monkeypatch.setattr(checkpoint, "_write_tensors", slow.write)
    return slow


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[CheckpointSaver]:
    with CheckpointSaver(tmp_path, Ranks(), print) as entered:
        yield entered


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Do something when a run takes this step."""
    original = Stepper.run

    def run(stepper: Stepper, batch: object, current: int):
        if current == step:
            action()
        return original(stepper, batch, current)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Stepper, "run", run)


def steps_in(folder: Path) -> list[int]:
    return [checkpoint.read(path).step for path in checkpoint.paths(folder)]


def read_back(path: Path) -> dict[str, torch.Tensor]:
    restored = {"weight": torch.zeros(2, 3), "double": torch.zeros((), dtype=torch.float64)}
    checkpoint.read(path).load(restored)
    return restored


def test_what_changes_after_the_call_is_not_in_the_checkpoint(disk: SlowDisk, saver: CheckpointSaver, tmp_path: Path):
    values = {"weight": torch.randn(3, 2).t(), "double": torch.tensor(0.1, dtype=torch.float64)}
    expected = {name: value.clone() for name, value in values.items()}
    saver.save(values, {"step": 1}, ALL)
    for value in values.values():
        value.fill_(7)
    assert not checkpoint.paths(tmp_path), "it is not complete yet"
    disk.may_go_on.set()
    saver.wait()
    found = read_back(tmp_path / "step_00000001")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_memory_of_one_copy_serves_the_next_without_touching_what_is_written(
    saver: CheckpointSaver, tmp_path: Path
):
    weight = torch.zeros(2, 3)
    values = {"weight": weight, "double": torch.tensor(0.0, dtype=torch.float64)}
    for step in (1, 2, 3):
        weight.fill_(step)
        saver.save(values, {"step": step}, ALL)
    saver.wait()
    assert [read_back(path)["weight"].unique().tolist() for path in checkpoint.paths(tmp_path)] == [[1.0], [2.0], [3.0]]


def test_the_next_checkpoint_waits_for_the_one_before(disk: SlowDisk, saver: CheckpointSaver, tmp_path: Path):
    saver.save({"weight": torch.ones(1)}, {"step": 1}, ALL)
    threading.Timer(0.2, disk.may_go_on.set).start()
    saver.save({"weight": torch.ones(1)}, {"step": 2}, ALL)
    assert (tmp_path / "step_00000001").is_dir()
    saver.wait()
    assert steps_in(tmp_path) == [1, 2]


def test_a_checkpoint_that_is_waited_for_is_there_and_older_ones_go(saver: CheckpointSaver, tmp_path: Path):
    for step in (1, 2, 3):
        saver.save({"weight": torch.ones(1)}, {"step": step}, Kept(newest=1, best_step=1), wait=True)
        assert step in steps_in(tmp_path)
    assert steps_in(tmp_path) == [1, 3]


def test_a_write_that_fails_is_told_once_and_the_older_checkpoint_stays(
    disk: SlowDisk, saver: CheckpointSaver, tmp_path: Path
):
    disk.may_go_on.set()
    saver.save({"weight": torch.ones(1)}, {"step": 1}, ALL, wait=True)
    disk.failing.add("step_00000002.tmp")
    saver.save({"weight": torch.ones(1)}, {"step": 2}, ALL)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not saver.has_failed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(NoRoomError, match=r"No space left on device; the last complete one is .*step_00000001"):
        saver.wait()
    saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_leaving_with_an_error_waits_for_the_write_and_tells_of_its_failure_too(disk: SlowDisk, tmp_path: Path):
    said: list[str] = []
    disk.failing.add("step_00000001.tmp")

    def divide(saver: CheckpointSaver) -> None:
        with saver:
            saver.save({"weight": torch.ones(1)}, {"step": 1}, ALL)
            threading.Timer(0.1, disk.may_go_on.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        divide(CheckpointSaver(tmp_path, Ranks(), said.append))
    assert len(said) == 1
    assert "step_00000001 could not be written: No space left on device; there is no earlier one" in said[0]


def test_training_goes_on_while_a_checkpoint_is_written(
    config: Callable[..., TrainConfig], disk: SlowDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before_step(monkeypatch, 4, disk.may_go_on.set)  # the checkpoint of step 2 waits for that
    run = train(config(), root=tmp_path)
    assert disk.began == [f"step_{step:08d}.tmp" for step in (2, 4, 6)]
    assert steps_in(run.checkpoints) == [4, 6]


def test_without_it_training_waits(
    config: Callable[..., TrainConfig], disk: SlowDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[bool] = []
    folder = tmp_path / "small" / "checkpoints"
    disk.may_go_on.set()
    before_step(monkeypatch, 3, lambda: seen.append((folder / "step_00000002").is_dir()))
    train(config(train={"async_checkpoint": False}), root=tmp_path)
    assert seen == [True]


def test_a_failed_write_ends_the_run_at_its_next_step(
    config: Callable[..., TrainConfig], disk: SlowDisk, tmp_path: Path
):
    disk.failing.add("step_00000002.tmp")
    disk.may_go_on.set()
    with pytest.raises(TrainingError, match="step_00000002 could not be written"):
        train(config(train={"steps": 10000, "checkpoint_interval": 2, "validation_interval": 10000}), root=tmp_path)
    assert not list((tmp_path / "small" / "checkpoints").iterdir())


def test_a_signal_during_a_write_gives_both_checkpoints(
    config: Callable[..., TrainConfig], disk: SlowDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Timer(0.1, disk.may_go_on.set).start()

    before_step(monkeypatch, 3, stop)
    with pytest.raises(RunStoppedError, match="after step 3"):
        train(config(), root=tmp_path)
    assert steps_in(tmp_path / "small" / "checkpoints") == [2, 3]
