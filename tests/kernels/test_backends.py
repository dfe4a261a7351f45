"""The kernels that can be asked for, and what is said of one that cannot run."""

import pytest
import torch

from remoe.errors import ConfigError
from remoe.kernels.expert_mlp import backends


@pytest.mark.parametrize("is_installed", [True, False])
def test_kernels_that_cannot_run_here_are_told_and_how_to_get_triton_only_where_it_is_missing(
    is_installed, monkeypatch
):
    monkeypatch.setattr(backends, "find_spec", lambda name: object() if is_installed else None)
    with pytest.raises(ConfigError) as caught:
        backends.pick("triton", torch.zeros(2, 16))
    said, _, fix = str(caught.value).partition("; ")
    assert said == "kernels is 'triton', must be one of auto, plain for torch.float32 of width 16 on cpu"
    assert fix == ("" if is_installed else "triton is not installed; it comes with: pip install 'remoe[triton]'")
