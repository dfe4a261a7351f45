"""Facts about runs with `train.deterministic`."""

import os

import pytest
import torch
from safetensors.torch import load_file

from remoe.errors import ConfigError, TrainingError
from remoe.training import checkpoint, train
from remoe.training.config import LoopConfig
from remoe.training.deterministic import WORKSPACE, same_bits

ON = LoopConfig(deterministic=True)


def saved_bits(run) -> dict[str, bytes]:
    """The bits of every tensor in every checkpoint; the writer orders the names in its files as it likes."""
    return {
        f"{file.relative_to(run.path)} {name}": tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        for path in checkpoint.paths(run.checkpoints)
        for file in path.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("router", ["relu", "topk", "recurrent_relu", "sparsemixer"])
def test_two_runs_are_equal_bit_for_bit(config, numbers, tmp_path, router):
    built = config(model={"router": router}, train={"deterministic": True})
    first, second = (train(built, root=tmp_path / name) for name in ("first", "second"))
    assert numbers(first.metrics()) == numbers(second.metrics())
    assert saved_bits(first) == saved_bits(second)
    assert len(saved_bits(first)) > 50
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_may_turn_it_on_when_it_goes_on(config, numbers, tmp_path):
    constant = {"schedule": "constant"}
    whole = train(config("whole", optimizer=constant), root=tmp_path)
    train(config("parts", optimizer=constant, train={"steps": 2}), root=tmp_path)
    parts = train(config("parts", optimizer=constant, train={"deterministic": True}), root=tmp_path, resume=True)
    assert numbers(parts.metrics())[2:] == numbers(whole.metrics())[2:]


def test_torchs_settings_hold_inside_and_come_back(monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with same_bits(ON):
        assert torch.are_deterministic_algorithms_enabled()
        assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
        assert os.environ[WORKSPACE] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (False, True)


def test_an_operation_that_cannot_repeat_itself_is_named():
    with (
        pytest.raises(TrainingError, match=r"train.deterministic is true, but put_ .*; set it to false"),
        same_bits(ON),
    ):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match=r"^something else$"), same_bits(ON):
        raise RuntimeError("something else")


@pytest.mark.parametrize("workspace", [None, ":1:1"])
def test_a_gpu_that_has_started_without_a_fixed_workspace_is_told(monkeypatch, workspace):
    monkeypatch.delenv(WORKSPACE, raising=False)
    if workspace is not None:
        monkeypatch.setenv(WORKSPACE, workspace)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match=f"start it with {WORKSPACE}=:4096:8"), same_bits(ON):
        raise AssertionError("not reached")
