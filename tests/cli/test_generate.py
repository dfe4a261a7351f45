"""`remoe generate` as a person sees it: text while it is written, the speed, and one line for a wrong value."""

import re
import shutil
import sys

import pytest


@pytest.fixture(name="arguments")
def _arguments(run_folder):
    return ("generate", run_folder, "--prompt", "Liné", "--max-new-tokens", 12, "--seed", 3, "--device", "cpu")


def test_a_terminal_sees_the_text_piece_by_piece_and_in_sum_the_same(remoe, arguments, monkeypatch):
    whole = remoe(*arguments).out
    written = []
    write = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "write", lambda text: written.append(text) or write(text))
    assert remoe(*arguments).out == whole
    pieces = [text for text in written if text]
    assert pieces[:4] == ["L", "i", "n", "é"]
    assert len(pieces) > 6


def test_where_nobody_watches_the_text_is_printed_at_once(remoe, arguments, monkeypatch):
    written = []
    monkeypatch.setattr(sys.stdout, "write", lambda text: written.append(text))
    remoe(*arguments)
    assert [text for text in written if text.startswith("L")] == written[:1]


def test_speed_is_said_on_standard_error(remoe, arguments):
    said = re.fullmatch(r"(\d+) tokens in (\S+) s, ([\d.,]+) tokens/s\n", remoe(*arguments).err)
    assert said is not None
    assert 0 < int(said[1]) <= 12
    assert float(said[3].replace(",", "")) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--device gpu", "--device is 'gpu', must be auto, cpu, cuda or cuda:N"),
        ("--seed 99999999999999999999", "--seed is 99999999999999999999, must be at most 9223372036854775807;"),
        ("--top-k 0", "--top-k is 0, must be at least 1"),
        ("--max-new-tokens -1", "--max-new-tokens is -1, must be at least 0"),
        ("--temperature x", "--temperature is x, must be a number"),
        ("--seed y", "--seed is y, must be a whole number; see `remoe generate --help`"),
        ("--temperature nan", "temperature is nan, must be at least 0.0"),
    ],
)
def test_a_wrong_value_is_one_line_with_what_is_allowed(remoe, run_folder, options, message):
    outcome = remoe("generate", run_folder, *options.split())
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert message in outcome.err


def test_a_damaged_checkpoint_is_told_in_one_plain_line(remoe, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "cut")
    newest = tmp_path / "cut" / "checkpoints" / "step_00000004"
    (newest / "manifest.json").write_text("{")
    outcome = remoe("generate", "cut", "--max-new-tokens", 1, "--device", "cpu")
    assert outcome.code == 0
    first, speed = outcome.err.splitlines()
    assert first.startswith("remoe: warning: ")
    assert first.endswith("; using step_00000002")
    assert "Warning" not in first
    assert speed.startswith("1 tokens in ")
