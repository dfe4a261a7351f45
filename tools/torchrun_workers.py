"""Which processes torchrun has started."""

import subprocess
from pathlib import Path
from typing import Any


def workers_of(process: subprocess.Popen[Any]) -> dict[int, int]:
    """Rank to process id, of torchrun's children."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            variables = status.with_name("environ").read_bytes().split(b"\0") if parent == process.pid else []
        except OSError:  # it has ended
            continue
        found |= {int(variable[5:]): int(status.parent.name) for variable in variables if variable.startswith(b"RANK=")}
    return found
