"""A run of several processes whose newest checkpoint has lost a shard."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remoe.training import TrainConfig, checkpoint
from remoe.training.run import Run
from tests.distributed.test_training import CONSTANT, remoe_train, write_config
from tests.training.conftest import config, numbers, text  # noqa: F401

pytestmark = pytest.mark.xdist_group("distributed")


def test_a_lost_shard_of_the_second_process_costs_one_checkpoint_and_no_number(
    config: Callable[..., TrainConfig], numbers: Callable[..., Any], tmp_path: Path  # noqa: F811
):  # fmt: skip
    path = write_config(tmp_path, config(optimizer=CONSTANT))
    whole, broken = (Run.open(begin(path, tmp_path / name)) for name in ("whole", "broken"))
    older, newest = checkpoint.paths(broken.checkpoints)[-2:]
    (lost,) = newest.glob("shard-00002-*.safetensors")
    lost.unlink()
    finished = remoe_train(2, path, tmp_path / "broken", "--resume")
    assert finished.returncode == 0, finished.stderr[-4000:]
    told = finished.stdout + finished.stderr
    assert told.count(f"{lost.name} is missing; going on from {older.name}") == 1
    assert numbers(broken.metrics()) == numbers(whole.metrics())
    assert [checkpoint.read(found).step for found in checkpoint.paths(broken.checkpoints)][-1] == 6


def begin(path: str, root: Path) -> Path:
    """A finished run of two processes."""
    finished = remoe_train(2, path, root)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return root / "small"
