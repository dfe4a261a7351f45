"""The kernels that can be asked for, and what is said of one that cannot run."""

import pytest
import torch

from remoe.errors import ConfigError
from remoe.kernels.expert_mlp import backends


@pytest.mark.parametrize(
    ("name", "is_installed", "fix"),
    [
        ("triton", True, ""),
        ("triton", False, "; triton is not installed; it comes with: pip install 'remoe[triton]'"),
        ("grouped_mm", False, ""),
    ],
)
def test_kernels_that_cannot_run_here_are_told_and_how_to_get_triton_where_it_is_wanted_and_missing(
    name, is_installed, fix, monkeypatch
):
    monkeypatch.setattr(backends, "find_spec", lambda name: object() if is_installed else None)
    with pytest.raises(ConfigError) as caught:
        backends.pick(name, torch.zeros(2, 16))
    said = f"kernels is {name!r}, must be one of auto, plain for torch.float32 of width 16 on cpu"
    assert str(caught.value) == said + fix
