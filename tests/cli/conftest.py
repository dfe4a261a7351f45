"""The command line in this process, and one tiny trained run for all tests that look at one."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from remoe.cli import main
from tests.recipes.conftest import TINY


class Outcome(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


Remoe = Callable[..., Outcome]


@pytest.fixture
def remoe(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remoe:
    """Run `remoe ARGUMENTS…` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        return Outcome(int(leaving.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments that make a demo recipe tiny and let it read a small text of its own."""
    folder = tmp_path_factory.mktemp("text")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Line {i} of a text, {i * i} is its square." for i in range(200)), encoding="utf-8")
    settings = (*TINY, f"data.train={text}", f"data.cache={folder / 'cache'}")
    return tuple(argument for setting in settings for argument in ("--set", setting))


@pytest.fixture(scope="session")
def run_folder(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, not to be changed."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.raises(SystemExit) as leaving:
        main(["train", "demo-relu", *tiny, "--set", "name=seen", "--no-report", "--root", str(root)])
    assert not leaving.value.code
    return root / "seen"
