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
        ("quack", False, "; QuACK's products are for Hopper GPUs, bf16 and fp16"),
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


@pytest.mark.parametrize("version", ["0.3.10", "0.4.0", "0.6.5"])
def test_a_version_of_quack_that_was_not_tried_is_left_alone_and_said(version, monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    monkeypatch.setattr(backends, "version", lambda name: version)
    with pytest.warns(
        RemoeWarning, match=rf"version {version} is installed, 0\.3\.11 or a later 0\.3 is needed; fix: pip"
    ):
        assert not backends._imports_quack.__wrapped__()


def test_a_quack_that_does_not_go_with_its_libraries_is_left_alone_and_said(monkeypatch):
    def broken(name):
        raise AttributeError("module 'cute.core' has no attribute 'ThrCopy'")

    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    monkeypatch.setattr(backends, "version", lambda name: "0.3.11.post1")
    monkeypatch.setattr(backends, "import_module", broken)
    with pytest.warns(RemoeWarning, match="Triton's are: module 'cute.core' has no attribute 'ThrCopy'; fix: pip"):
        assert not backends._imports_quack.__wrapped__()
