"""Tuning settles each part on the fastest choice that computes the right thing."""

import time
from contextlib import contextmanager

import pytest
import torch

from remoe.bench import ours, tune
from remoe.bench.shapes import SHAPES
from remoe.bench.tables import tune_line
from remoe.bench.tune import Tuning
from remoe.errors import ConfigError


class FakeKernels:
    """Choices that only cost time: `slow` 20 ms, `fast` none; `wrong` doubles the output, `broken` raises."""

    def __init__(self) -> None:
        self.active: dict[str, str] = {}
        self.saved: list = []

    def parts(self, shape, dtype, device):
        assert shape == {"num_tokens": 64, "hidden_size": 32, "expert_size": 16, "num_experts": 8, "top_k": 2}
        return {"up": ["slow", "fast", "wrong"], "down": ["slow", "broken", "fast"]}

    @contextmanager
    def forced(self, part, choice):
        before, self.active = self.active, self.active | {part: choice}
        yield
        self.active = before

    def save(self, rows, path):
        self.saved = list(rows)
        return path

    def layer(self, problem, routing):
        right = ours.COLUMNS["remoe"](problem, routing)

        def forward():
            if "broken" in self.active.values():
                raise RuntimeError("out of resource: shared memory")
            time.sleep(0.02 * list(self.active.values()).count("slow"))
            return right() * (2 if "wrong" in self.active.values() else 1)

        return forward


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> FakeKernels:
    fake = FakeKernels()
    monkeypatch.setattr(ours, "capacity", fake.layer)
    return fake


def tuning(tmp_path, **changes) -> Tuning:
    settings = {"shapes": [SHAPES["tiny"]], "device": torch.device("cpu"), "dtype": torch.float32}
    return Tuning(**(settings | {"table": tmp_path / "table.json"} | changes))


def test_each_part_gets_its_fastest_right_choice_and_the_table_is_saved(kernels, tmp_path):
    row = tune.tune(tuning(tmp_path), kernels).rows[0]
    assert row["best"] == {"up": "fast", "down": "fast"}
    assert row["first_ms"] > row["best_ms"] + 20
    assert kernels.saved == [row]
    assert tune_line(row).endswith("up fast, down fast")


def test_choices_that_fail_or_differ_are_passed_over_with_their_reason(kernels, tmp_path):
    tried = tune.tune(tuning(tmp_path), kernels).rows[0]["tried"]
    assert tried["up"]["wrong"].startswith("ArithmeticError: differs: out: 1.000e+00")
    assert tried["down"]["broken"] == "RuntimeError: out of resource: shared memory"


def test_shapes_after_the_deadline_are_left_out_of_the_table(kernels, tmp_path):
    results = tune.tune(tuning(tmp_path, deadline_seconds=0.0), kernels)
    assert results.rows == [{"shape": "tiny", "note": "left out: deadline"}]
    assert kernels.saved == []


def test_without_kernels_there_is_nothing_to_tune(monkeypatch):
    monkeypatch.setattr(tune, "KERNELS", "remoe.kernels.nothing")
    with pytest.raises(ConfigError, match="there is nothing to tune"):
        tune.tunable()
