"""The pages of docs/, and how their commands are run."""

import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The code of a page's fenced blocks in one language."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run_page(page: str, folder: Path) -> None:
    """Run a page's commands and Python blocks in their order: a command a line, a script a block."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(sh|python)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    for number, (language, code) in enumerate(found):
        script = folder / f"block_{number}.py"
        script.write_text(code, encoding="utf-8")
        for command in code.splitlines() if language == "sh" else [f"python {script.name}"]:
            run_line(command, folder)


def run_line(command: str, folder: Path) -> None:
    """Run one command in a folder, as a user does whose environment is active; it must succeed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    finished = subprocess.run(
        command,
        shell=True,
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
