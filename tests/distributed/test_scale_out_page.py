"""docs/how-to/scale-out.md: its commands, executed as written, one after the other, and its table of refusals."""

import ast
import inspect
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from remoe.config import apply_overrides, from_dict
from remoe.distributed import config as checks
from remoe.errors import ConfigError
from remoe.training import TrainConfig, setup
from remoe.training.run import Run
from tests.docs.conftest import DOCS, blocks, run_line

PROCESSES = 4
FITTING: dict[str, Any] = {
    "model": {
        "vocab_size": 32, "hidden_size": 16, "num_layers": 4, "num_heads": 4, "num_kv_heads": None, "num_experts": 4,
    },
    "data": {"sequence_length": 32},
    "train": {"batch_size": 8},
}  # fmt: skip
CHECKS: tuple[Callable[..., Any], ...] = (
    checks.resolve_parallel, checks.check_experts, checks.check_layers, checks.check_sequence, checks.own_micro_batch,
    setup.resolve_ranks,
)  # fmt: skip
Place = tuple[str, int]
"""A function and a line."""


def refusals() -> list[list[str]]:
    """The settings of each row of the table."""
    section = (DOCS / "how-to" / "scale-out.md").read_text(encoding="utf-8").split("## What is refused together")[1]
    return [row.split() for row in re.findall(r"^\| `([^`]*=[^`]*)` \|", section.split("\n## ")[0], re.MULTILINE)]


def refused_at(settings: Sequence[str]) -> Place | None:
    """Where in the code four processes with these settings are refused; None: nowhere."""
    try:
        setup.resolve_ranks(from_dict(TrainConfig, apply_overrides(FITTING, settings)), PROCESSES)
    except ConfigError as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return frame.name, frame.lineno or 0
    return None


def test_settings_of_a_row_are_refused_together_and_only_together():
    assert refused_at([]) is None
    assert len(refusals()) >= 10
    for settings in refusals():
        place = refused_at(settings)
        assert place is not None, settings
        for left_out in settings:
            fewer = [setting for setting in settings if setting != left_out]
            assert refused_at(fewer) != place, (settings, left_out)


def test_every_refusal_of_a_layout_is_in_the_table():
    said = {place for settings in refusals() if (place := refused_at(settings))}
    for check in CHECKS:
        source, first_line = inspect.getsourcelines(check)
        for node in ast.walk(ast.parse("".join(source))):
            if isinstance(node, ast.Raise):
                lines = range(first_line + node.lineno - 1, first_line + (node.end_lineno or node.lineno))
                assert any(name == check.__name__ and line in lines for name, line in said), (check.__name__, lines[0])


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
def test_every_command_of_the_page_runs_as_written(tmp_path: Path):
    commands = "".join(blocks("how-to/scale-out.md", "sh")).splitlines()
    assert len(commands) == 11
    for command in commands:
        run_line(command, tmp_path)
    assert Run.open(tmp_path / "runs" / "two").step == 10
    assert (tmp_path / "exported" / "model.safetensors").is_file()
