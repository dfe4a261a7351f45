"""One process at a time trains in a run's folder."""

import multiprocessing
import os
import socket
import threading
import time

import pytest

from remoe.errors import ConfigError
from remoe.training import Run, lock, train
from remoe.training.step import Stepper


def hold_and_wait(path, is_held):
    with lock.hold(path):
        is_held.set()
        time.sleep(600)


@pytest.fixture
def holder(tmp_path):
    """Another process that trains in `tmp_path`/small, as far as the lock can tell."""
    context = multiprocessing.get_context("spawn")
    is_held = context.Event()
    process = context.Process(target=hold_and_wait, args=(tmp_path / "small", is_held))
    process.start()
    assert is_held.wait(60)
    yield process
    process.kill()
    process.join()


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_run_that_another_process_trains_is_refused_with_its_number_and_left_alone(config, tmp_path, holder, how):
    (tmp_path / "small" / "metrics.jsonl").write_text("{}\n")
    message = rf"run .*small is being trained by process {holder.pid}; wait for it, stop it, or choose another name"
    with pytest.raises(ConfigError, match=message):
        train(config(), root=tmp_path, **how)
    assert {path.name for path in (tmp_path / "small").iterdir()} == {"metrics.jsonl", lock.LOCK}
    assert lock.is_held(tmp_path / "small")


def test_a_killed_process_holds_nothing_and_its_run_can_be_trained(config, tmp_path, holder):
    holder.kill()
    holder.join()
    assert (tmp_path / "small" / lock.LOCK).is_file()
    assert not lock.is_held(tmp_path / "small")
    assert train(config(train={"steps": 2}), root=tmp_path, resume=True).step == 2


def test_the_lock_is_held_while_a_run_trains_also_against_a_thread_and_gone_after(config, tmp_path, monkeypatch):
    original, found = Stepper.run, []

    def try_again(stepper, batch, step):
        with pytest.raises(ConfigError, match=f"by process {os.getpid()};") as caught:
            train(config(train={"steps": 2}), root=tmp_path, overwrite=True)
        found.append(caught)
        return original(stepper, batch, step)

    monkeypatch.setattr(Stepper, "run", try_again)
    thread = threading.Thread(target=lambda: train(config(train={"steps": 2}), root=tmp_path))
    thread.start()
    thread.join()
    assert len(found) == 2
    assert Run.open(tmp_path / "small").step == 2
    assert not (tmp_path / "small" / lock.LOCK).exists()


def test_a_holder_on_another_machine_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "there")
    with lock.hold(tmp_path / "small"):
        monkeypatch.setattr(socket, "gethostname", lambda: "here")
        with pytest.raises(ConfigError, match=f"by process {os.getpid()} on there; "):
            lock.check_free(tmp_path / "small")
    lock.check_free(tmp_path / "small")


def test_folders_made_for_a_lock_go_with_it_unless_something_is_in_them(tmp_path):
    with lock.hold(tmp_path / "runs" / "group" / "small"):
        (tmp_path / "runs" / "other").mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "other"]


def test_a_lock_whose_file_was_replaced_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    original = lock._try_lock

    def let_the_holder_leave_first(file, **kind):
        monkeypatch.undo()
        (tmp_path / lock.LOCK).unlink()
        return original(file, **kind)

    monkeypatch.setattr(lock, "_try_lock", let_the_holder_leave_first)
    with lock.hold(tmp_path):
        assert lock.is_held(tmp_path)


def test_a_file_in_place_of_the_folder_of_runs_is_named(config, tmp_path):
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(ConfigError, match=r"runs is a file, must be a folder"):
        train(config(), root=tmp_path / "runs")
