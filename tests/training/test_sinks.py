"""Facts about additional places for metrics."""

import builtins
import importlib.util
from pathlib import Path

import pytest

from remoe.errors import MissingExtraError
from remoe.training import sinks
from remoe.training.sinks import SINKS, Sinks, check_sinks, flatten, numbers


class BrokenSink:
    def __init__(self, *arguments: object) -> None:
        self.closed = False

    def write(self, metrics: object) -> None:
        raise ConnectionError("the network is gone")

    def close(self) -> None:
        raise AssertionError("a failed sink is not used again")


class ListSink(BrokenSink):
    lines: list[object]

    def __init__(self, *arguments: object) -> None:
        self.lines = []

    def write(self, metrics: object) -> None:
        self.lines.append(metrics)

    def close(self) -> None:
        self.lines.append("closed")


def test_a_failing_sink_warns_once_and_the_others_go_on(monkeypatch):
    good = ListSink()
    monkeypatch.setattr(sinks, "SINKS", {"wandb": BrokenSink, "trackio": lambda *arguments: good})
    warnings: list[str] = []
    opened = Sinks(warnings.append)
    opened.open(["wandb", "trackio"], Path(), {}, 0)
    for step in (1, 2):
        opened.write({"step": step})
    opened.close()
    assert warnings == ["metrics sink wandb failed and is left out: ConnectionError: the network is gone"]
    assert good.lines == [{"step": 1}, {"step": 2}, "closed"]


def test_a_sink_that_cannot_be_opened_warns_too(monkeypatch):
    def refuse(*arguments: object) -> BrokenSink:
        raise OSError("no such service")

    monkeypatch.setattr(sinks, "SINKS", {"wandb": refuse})
    warnings: list[str] = []
    Sinks(warnings.append).open(["wandb"], Path(), {}, 0)
    assert warnings == ["metrics sink wandb failed and is left out: OSError: no such service"]


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"wandb is not installed.*remoe\[wandb\]"):
        check_sinks(["wandb"])


def test_every_sink_of_the_config_exists_and_imports_its_library_late(monkeypatch):
    assert set(SINKS) == {"tensorboard", "wandb", "trackio"}
    real = builtins.__import__

    def blocked(name: str, *arguments: object) -> object:
        assert name.split(".")[0] not in ("tensorboard", "wandb", "trackio")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", blocked)
    importlib.reload(sinks)


def test_metrics_are_flattened_by_path_and_missing_values_left_out():
    line = {"loss": 1.0, "name": "x", "sparsity": None, "valid": {"code": 2.0}, "layers": {"load": [0.5, None, 1]}}
    flat = {"loss": 1.0, "valid/code": 2.0, "layers/load/00": 0.5, "layers/load/02": 1}
    assert dict(flatten(line)) == flat
    assert numbers({"step": 3} | line) == flat
