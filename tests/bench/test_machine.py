"""What a result says about where it was measured."""

import sys

import pytest

from remoe.bench import machine


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/opt/python3", "-m", "remoe", "bench", "layer"], "python3 -m remoe bench layer"),
        (["/opt/python3", "/home/me/.venv/bin/remoe", "bench", "--json", "/tmp/x/a.json"], "remoe bench --json a.json"),
    ],
)
def test_the_command_leaves_out_folders_of_this_machine(argv, expected, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "orig_argv", argv)
    assert machine.command() == expected


def test_only_installed_libraries_are_listed():
    versions = machine.describe()["versions"]
    assert isinstance(versions, dict)
    assert "torch" in versions
    assert None not in versions.values()
