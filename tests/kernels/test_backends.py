"""The kernels that can be asked for, and what is said of one that cannot run."""

import pytest
import torch

from remoe.errors import ConfigError, RemoeWarning
from remoe.kernels.expert_mlp import backends


@pytest.mark.parametrize(
    ("name", "is_installed", "fix"),
    [
        ("triton", True, ""),
        ("triton", False, "; triton is not installed; it comes with: pip install 'remoe[triton]'"),
        ("quack", True, ""),
        ("quack", False, "; quack-kernels is not installed; it comes with: pip install 'remoe[quack]'"),
        ("grouped_mm", False, ""),
    ],
)
def test_kernels_that_cannot_run_here_are_told_and_how_to_get_those_that_are_missing(
    name, is_installed, fix, monkeypatch
):
    monkeypatch.setattr(backends, "find_spec", lambda name: object() if is_installed else None)
    with pytest.raises(ConfigError) as caught:
        backends.pick(name, torch.zeros(2, 16))
    said = f"kernels is {name!r}, must be one of auto, plain for torch.float32 of width 16 on cpu"
    assert str(caught.value) == said + fix


def test_a_version_of_quack_that_was_not_tried_is_left_alone_and_said(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    monkeypatch.setattr(backends, "version", lambda name: "0.6.5")
    with pytest.warns(RemoeWarning, match=r"version 0\.6\.5 is installed, 0\.3\.x is needed; fix: pip install"):
        assert not backends._imports_quack.__wrapped__()
