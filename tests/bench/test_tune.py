"""Tuning settles each part on the fastest choice that computes the right thing."""

import time
from contextlib import contextmanager

import pytest
import torch

from remoe.bench import ours, tune
from remoe.bench.clock import Clock
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

    def num_slow(self) -> int:
        return list(self.active.values()).count("slow")

    def layer(self, problem, routing):
        right = ours.COLUMNS["remoe"](problem, routing)

        def forward():
            if "broken" in self.active.values():
                raise RuntimeError("out of resource: shared memory")
            time.sleep(0.02 * self.num_slow())
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


def test_the_other_parts_are_settled_anew_for_each_choice_of_the_first(kernels, tmp_path, monkeypatch):
    costs = {("slow", "slow"): 2, ("slow", "fast"): 1, ("fast", "slow"): 0, ("fast", "fast"): 3}  # one by one: 1
    monkeypatch.setattr(kernels, "parts", lambda *_: {"up": ["slow", "fast"], "down": ["slow", "fast"]})
    monkeypatch.setattr(kernels, "num_slow", lambda: costs[kernels.active["up"], kernels.active["down"]])
    row = tune.tune(tuning(tmp_path), kernels).rows[0]
    assert row["best"] == {"up": "fast", "down": "slow"}


def test_parts_that_are_not_asked_for_keep_todays_choice(kernels, tmp_path):
    row = tune.tune(tuning(tmp_path, parts=["down"]), kernels).rows[0]
    assert row["best"] == {"up": "slow", "down": "fast"}
    with pytest.raises(ConfigError, match=r"--parts has 'dawn', must be one of up, down; did you mean 'down'\?"):
        tune.tune(tuning(tmp_path, parts=["dawn"]), kernels)


def test_todays_choices_stay_where_nothing_is_faster(kernels, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "parts", lambda *_: {"up": ["fast", "slow"], "down": ["fast", "slow"]})
    times = iter([[1.0, 2.0], [1.0, 2.0], [3.0, 3.5, 4.0]])  # of down for each up, then of today and both ways
    monkeypatch.setattr(Clock, "medians_in_turn_ms", lambda *_: next(times))
    row = tune.tune(tuning(tmp_path), kernels).rows[0]
    assert row["best"] == {"up": "fast", "down": "fast"}
    assert row["first_ms"] == row["best_ms"] == 3.0


def test_without_a_choice_that_works_there_is_a_note_and_no_row_in_the_table(kernels, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "parts", lambda *_: {"up": ["broken"], "down": ["slow", "fast"]})
    row = tune.tune(tuning(tmp_path), kernels).rows[0]
    assert row == {"shape": "tiny", "note": "no choice works: RuntimeError: out of resource: shared memory"}
    assert kernels.saved == []


def test_where_todays_choice_fails_its_reason_stands_for_its_time(kernels, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "parts", lambda *_: {"up": ["broken", "fast"], "down": ["fast"]})
    row = tune.tune(tuning(tmp_path), kernels).rows[0]
    assert row["best"] == {"up": "fast", "down": "fast"}
    assert "RuntimeError: out of resource: shared memory -> " in tune_line(row)


def test_calls_that_are_timed_in_turn_alternate():
    made: list[str] = []
    clock = Clock(torch.device("cpu"))
    times = clock.medians_in_turn_ms([lambda: made.append("a"), lambda: made.append("b")], rounds=3)
    assert "".join(made) == "ab" * 4  # once before the first round
    assert len(times) == 2


def test_shapes_after_the_deadline_are_left_out_of_the_table(kernels, tmp_path):
    results = tune.tune(tuning(tmp_path, deadline_seconds=0.0), kernels)
    assert results.rows == [{"shape": "tiny", "note": "left out: deadline"}]
    assert kernels.saved == []


def test_without_kernels_there_is_nothing_to_tune(monkeypatch):
    monkeypatch.setattr(tune, "KERNELS", "remoe.kernels.nothing")
    with pytest.raises(ConfigError, match="there is nothing to tune"):
        tune.tunable()
