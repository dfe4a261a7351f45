"""What a result was measured on: written into every file of results."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path

import torch

LIBRARIES = (
    "torch", "triton", "transformers", "numpy", "liger_kernel", "sonic_moe", "quack-kernels", "scattermoe",
)  # fmt: skip


def describe() -> dict[str, object]:
    """Machine, versions, command and date."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "versions": {name: version for name in LIBRARIES if (version := _version(name))},
    }


def command() -> str:
    """How this process was started, without the folders that only this machine has."""
    words = sys.orig_argv if len(sys.orig_argv) < 2 or sys.orig_argv[1].startswith("-") else sys.orig_argv[1:]
    return shlex.join(Path(word).name if word.startswith("/") else word for word in words)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
