"""The pages of docs/, and how their commands are run."""

import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The code of a page's fenced blocks in one language."""
    return [code for _, code in blocks_in_order(page, language)]


def blocks_in_order(page: str, *languages: str) -> list[tuple[str, str]]:
    """(language, code) of a page's fenced blocks; without languages those that can be run."""
    text = (DOCS / page).read_text(encoding="utf-8")
    named = "|".join(languages or ("sh", "python"))
    return re.findall(rf"^```({named})\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run_page(page: str, folder: Path) -> None:
    """Run a page's blocks of commands and of Python in their order."""
    for language, code in blocks_in_order(page):
        _run(["sh", "-ec", code] if language == "sh" else [sys.executable, "-c", code], folder)


def run_line(command: str, folder: Path) -> None:
    """Run one command in a folder, as a user does whose environment is active; it must succeed."""
    _run(["sh", "-c", command], folder)


def _run(command: list[str], folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    finished = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert finished.returncode == 0, (command, finished.stderr[-2000:])


def run_python(page: str, folder: Path) -> None:
    """Run a page's Python blocks one after the other, as one script."""
    script = folder / "page.py"
    script.write_text("\n".join(blocks(page, "python")), encoding="utf-8")
    run_line(f"python {script.name}", folder)
