"""Runs whose disk is full, slow or damaged: each goes on from the last complete checkpoint, with the same numbers."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from remoe.config import to_yaml
from remoe.errors import NoRoomError
from remoe.training import checkpoint, train
from remoe.training.metrics import MetricsFile, read_metrics
from remoe.training.progress import LogReporter

CONSTANT = {"schedule": "constant"}
"""A learning rate that does not depend on the number of steps."""


class Messages(LogReporter):
    """Keeps what a person would have been told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


def has_small_disks() -> bool:
    """Whether a file system of a given size can be mounted here, unseen by other processes."""
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


ON_A_SMALL_DISK = """
mount -t tmpfs -o size={size} tmpfs {disk}
"$@"; echo $? > {folder}/first
cp -r {disk}/small {folder}/left
mount -o remount,size=32m {disk}
"$@"; echo $? > {folder}/second
cp -r {disk}/small {folder}/done
"""


@pytest.mark.slow
@pytest.mark.skipif(not has_small_disks(), reason="no file system of its own can be mounted")
def test_a_run_whose_disk_filled_up_goes_on_with_the_same_bits_once_there_is_room(config, numbers, tmp_path):
    built = config(optimizer=CONSTANT, train={"steps": 8, "validation_interval": 8})
    whole = train(built, root=tmp_path / "whole")
    (tmp_path / "config.yaml").write_text(to_yaml(built))
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(file.stat().st_size for file in checkpoint.paths(whole.checkpoints)[-1].iterdir())
    script = ON_A_SMALL_DISK.format(size=2 * size + size // 2, disk=disk, folder=tmp_path)
    command = [sys.executable, "-m", "remoe", "train", str(tmp_path / "config.yaml"), "--resume", "--no-report"]
    finished = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *command, "--root", str(disk)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    said = [line for line in finished.stderr.splitlines() if line.startswith("remoe: ")]
    assert ((tmp_path / "first").read_text(), (tmp_path / "second").read_text()) == ("2\n", "0\n"), finished.stderr
    assert len(said) == 1
    assert "No space left on device; the last complete one is" in said[0]
    left = checkpoint.paths(tmp_path / "left" / "checkpoints")
    assert len(left) >= 1
    assert all(checkpoint.read(path).step for path in left)
    assert numbers(read_metrics(tmp_path / "done" / "metrics.jsonl")) == numbers(whole.metrics())


def test_a_slow_disk_costs_time_and_nothing_else(config, numbers, tmp_path, monkeypatch):
    whole = train(config(), root=tmp_path / "fast")
    sync = os.fsync

    def slow(file: int) -> None:
        time.sleep(0.05)
        sync(file)

    monkeypatch.setattr(os, "fsync", slow)
    run = train(config(), root=tmp_path / "slow")
    assert numbers(run.metrics()) == numbers(whole.metrics())
    assert [path.name for path in run.checkpoints.iterdir()] == [path.name for path in whole.checkpoints.iterdir()]
    assert [checkpoint.read(path).step for path in checkpoint.paths(run.checkpoints)] == [4, 6]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shard(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "corrupt shard": (lambda path: flip_a_bit(shard(path)), "does not match its checksum"),
    "cut shard": (lambda path: os.truncate(shard(path), 1000), "has 1000 bytes, not"),
    "missing shard": (lambda path: shard(path).unlink(), "safetensors is missing"),
    "corrupt record": (lambda path: flip_a_bit(path / checkpoint.RECORD), "training.json does not match its checksum"),
    "missing record": (lambda path: (path / checkpoint.RECORD).unlink(), "training.json is missing"),
    "corrupt manifest": (lambda path: flip_a_bit(path / checkpoint.MANIFEST), "manifest.json"),
    "missing manifest": (lambda path: (path / checkpoint.MANIFEST).unlink(), "manifest.json is missing"),
    "empty folder": (lambda path: [file.unlink() for file in path.iterdir()], "manifest.json is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_with_the_same_bits(config, numbers, tmp_path, fault):
    whole = train(config(optimizer=CONSTANT, train={"steps": 8}), root=tmp_path / "whole")
    begun = train(config(optimizer=CONSTANT), root=tmp_path / "damaged")
    older, newest = checkpoint.paths(begun.checkpoints)[-2:]
    break_it, message = FAULTS[fault]
    break_it(newest)
    told = Messages()
    run = train(
        config(optimizer=CONSTANT, train={"steps": 8}), root=tmp_path / "damaged", resume=True, reporter=told
    )  # fmt: skip
    assert len(told.said) == 1
    assert message in told.said[0]
    assert told.said[0].endswith(f"going on from {older.name}")
    assert numbers(run.metrics()) == numbers(whole.metrics())
    assert newest.with_suffix(".damaged").is_dir(), "what is left of it is kept"


def test_metrics_that_do_not_fit_on_the_disk_say_what_to_do(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    file = MetricsFile(tmp_path / "metrics.jsonl")
    with pytest.raises(NoRoomError, match=r"metrics.jsonl could not be written: No space left .*--resume"):
        file.write({"step": 1})
    file.close()
