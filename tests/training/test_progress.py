"""Facts about what a run tells a person."""

import io
import logging
import sys

import pytest

from remoe.training.progress import BarReporter, LogReporter, PlainReporter, clock, describe, terminal_reporter

LINE = {
    "step": 5,
    "lm_loss": 2.5,
    "sparsity": 0.875,
    "sparsity_coef": 1.2e-8,
    "tokens_per_second": 12345.6,
    "skipped": 0,
}


def test_a_line_has_loss_sparsity_coefficient_and_speed():
    assert describe(LINE) == "loss 2.500  sparsity 0.875  coef 1.2e-08  12,346 tok/s"


def test_missing_numbers_are_left_out_and_skipped_steps_shown():
    line = {"lm_loss": float("nan"), "valid_loss": 2.0, "sparsity": None, "skipped": 3}
    assert describe(line) == "valid 2.000  skipped 3"


def test_a_process_that_holds_the_others_up_is_named():
    assert describe({"slowest_rank": 3, "slowest_ratio": 1.52}) == "process 3 1.5x slower"
    assert describe({"slowest_rank": 3, "slowest_ratio": 1.1}) == ""


@pytest.mark.parametrize(("seconds", "text"), [(5.9, "0:05"), (65, "1:05"), (3661, "1:01:01")])
def test_clock_shows_minutes_and_hours(seconds, text):
    assert clock(seconds) == text


def test_plain_lines_are_few_and_include_each_validation_and_the_last_step():
    said: list[str] = []
    reporter = PlainReporter(said.append)
    reporter.start("run", 1000, 0)
    for step in range(1, 1001):
        reporter.step(LINE | {"step": step} | ({"valid_loss": 2.0} if step == 777 else {}))
    assert said[0] == "run: 1000 steps"
    assert any(line.startswith("step 777/1000") and "valid 2.000" in line for line in said)
    assert said[-1].startswith("step 1000/1000")
    assert said[-1].endswith("0:00 left")
    assert 20 <= len(said) <= 25


def test_bar_or_lines_follow_the_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(terminal_reporter(), PlainReporter)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(terminal_reporter(), BarReporter)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(terminal_reporter(), PlainReporter)


def test_the_bar_shows_numbers_and_messages(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "200")
    reporter = BarReporter()
    reporter.start("run", 10, 0)
    reporter.message("step_00000100 [damaged]")
    reporter.step(LINE | {"valid_loss": 2.25})
    reporter.finish(None)
    assert "step_00000100 [damaged]" in screen.getvalue()
    assert "5/10" in screen.getvalue()
    assert "loss 2.500  sparsity 0.875  coef 1.2e-08  12,346 tok/s  valid 2.250" in screen.getvalue()


def test_messages_of_a_run_from_python_go_to_logging(caplog):
    with caplog.at_level(logging.WARNING):
        LogReporter().message("something")
    assert caplog.messages == ["something"]
