"""Facts about stopping a run by a signal."""

import os
import signal

import pytest

from remoe.training.signals import RunStoppedError, StopRequest


def test_the_first_signal_is_remembered_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.number is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.number, stop.name) == (signal.SIGTERM, "SIGTERM")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_interrupt_stops_at_once():
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_which_torchrun_passes_on_changes_nothing():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM


def test_an_interrupt_after_sigterm_stops_at_once():
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_exit_code_is_that_of_shells():
    assert RunStoppedError("stopped", signal.SIGINT).exit_code == 130
    assert RunStoppedError("stopped", signal.SIGTERM).exit_code == 143
