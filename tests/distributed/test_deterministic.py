"""Facts about `train.deterministic` on several processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remoe.training import TrainConfig
from remoe.training.run import Run
from tests.distributed.test_training import remoe_train, write_config
from tests.training.conftest import config, numbers, text  # noqa: F401
from tests.training.test_deterministic import saved_bits

pytestmark = pytest.mark.xdist_group("distributed")


def test_two_runs_of_two_processes_are_equal_bit_for_bit(
    config: Callable[..., TrainConfig], numbers: Callable[..., Any], tmp_path: Path  # noqa: F811
):  # fmt: skip
    path = write_config(tmp_path, config(train={"deterministic": True}, parallel={"expert": 2}))
    runs = []
    for name in ("first", "second"):
        finished = remoe_train(2, path, tmp_path / name)
        assert finished.returncode == 0, finished.stderr[-4000:]
        runs.append(Run.open(tmp_path / name / "small"))
    assert numbers(runs[0].metrics()) == numbers(runs[1].metrics())
    assert saved_bits(runs[0]) == saved_bits(runs[1])
    assert saved_bits(runs[0])
