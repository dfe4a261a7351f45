"""Facts about batches that a thread makes ahead."""

import threading

import pytest
import torch

from remoe.data import Batch
from remoe.errors import DataError
from remoe.training import Run, train, trainer
from remoe.training.prefetch import DEPTH, Prefetch

CPU = torch.device("cpu")


def batch_of(step: int) -> Batch:
    return Batch(*(torch.full((1, 2), step) for _ in range(4)))


def workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_batches_come_in_order_and_the_thread_ends():
    with Prefetch(batch_of, range(3, 9), CPU) as batches:
        assert [int(batch.tokens_BS[0, 0]) for batch in batches] == [3, 4, 5, 6, 7, 8]
        assert len(workers()) == 1
    assert workers() == []


def test_they_are_made_before_they_are_asked_for_and_no_further_ahead_than_the_depth():
    made, enough = [], threading.Event()

    def make(step: int) -> Batch:
        made.append(step)
        if step == DEPTH:
            enough.set()
        return batch_of(step)

    with Prefetch(make, range(1, 100), CPU) as batches:
        assert enough.wait(timeout=10)
        assert made == list(range(1, DEPTH + 1))
        next(batches)
    assert len(made) <= DEPTH + 1  # leaving early drops what was ordered


def test_an_error_comes_when_its_batch_is_due():
    def make(step: int) -> Batch:
        if step == 2:
            raise DataError("the file is damaged")
        return batch_of(step)

    with Prefetch(make, range(1, 5), CPU) as batches:
        assert int(next(batches).tokens_BS[0, 0]) == 1
        with pytest.raises(DataError, match="the file is damaged"):
            next(batches)
    assert workers() == []


def test_no_steps_need_no_batch():
    with Prefetch(batch_of, range(5, 5), CPU) as batches:
        assert list(batches) == []


def test_a_run_whose_data_fails_keeps_the_steps_before_and_leaves_no_thread(config, tmp_path, monkeypatch):
    original = trainer.Trainer._batch

    def failing(own, step: int) -> Batch:
        if step == 4:
            raise DataError("the file is damaged")
        return original(own, step)

    monkeypatch.setattr(trainer.Trainer, "_batch", failing)
    with pytest.raises(DataError, match="the file is damaged"):
        train(config(), root=tmp_path)
    assert [line["step"] for line in Run.open(tmp_path / "small").metrics()] == [1, 2, 3]
    assert workers() == []
