"""What a shell offers after TAB: the script it loads, recipes where a config is expected, and no wait for torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from remoe.recipes import names


@pytest.fixture(name="offered")
def _offered(cli_environment):
    """The words after `remoe …` are completed by bash itself, which has loaded `remoe --show-completion`."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")

    def complete(line: str) -> list[str]:
        words = line.split(" ")
        script = f"""
            eval "$(remoe --show-completion)"
            complete -p remoe >/dev/null || exit 1
            COMP_WORDS=({" ".join(words[:-1])} "{words[-1]}")
            COMP_CWORD={len(words) - 1}
            _remoe_completion remoe
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        finished = subprocess.run(
            ["bash", "--norc", "-c", script],
            env=cli_environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (finished.returncode, finished.stderr) == (0, "")
        return finished.stdout.split()

    return complete


@pytest.fixture(name="cli_environment")
def _cli_environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_bash_offers_recipes_where_a_config_is_expected(offered):
    assert offered("remoe train demo-r") == [name for name in names() if name.startswith("demo-r")]


def test_bash_offers_commands_and_options(offered):
    assert offered("remoe exp") == ["export"]
    assert "--overwrite" in offered("remoe train demo-relu --o")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("plan demo-den", ["demo-dense"]),
        ("compare demo-den", ["demo-dense"]),
        ("recipes show demo-den", ["demo-dense"]),
        ("bench model demo-relu,demo-den", ["demo-relu,demo-dense"]),
        ("bench decode demo-den", ["demo-dense"]),
        ("train mine.y", []),  # the shell goes on to offer files
    ],
)
def test_recipes_are_offered_by_each_command_that_takes_one(words, found, cli_environment):
    arguments = ["remoe", *words.split()]
    code = (
        "import sys\nfrom remoe.cli import main\n"
        "try: main([])\nfinally: assert 'torch' not in sys.modules, 'a shell waits for it'"
    )
    completion = {
        "_REMOE_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(arguments), "COMP_CWORD": str(len(arguments) - 1),
    }  # fmt: skip
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env=cli_environment | completion, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (finished.stdout.split(), finished.stderr) == (found, "")


def test_completion_adds_nothing_to_the_start_of_a_command():
    code = "import sys; from remoe.cli import main\ntry: main(['--version'])\nfinally: print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert {"rich", "yaml", "pydantic", "torch"} & set(loaded.stdout.split()) == set()
