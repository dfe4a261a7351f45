"""The processes of one run, forked from one that has imported torch and remoe already: what torchrun starts, sooner.

For tests of what the processes do; those of how they start, hang and die use torchrun itself.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "remoe.cli", "remoe.training.loop", "remoe.distributed.data_ranks", "remoe.distributed.stage_ranks",
        "remoe.distributed.shard", "torch.distributed.checkpoint",
    ]
)  # fmt: skip


GRACE_SECONDS = 10
"""What is left to the other processes after one has failed, to say what they have to say."""


def forked(
    num_processes: int, *command: str, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND` on so many processes of this machine, one thread each, with torchrun's environment.

    A process that fails soon ends the others, and its code is that of all. Raises TimeoutError after `timeout` seconds.
    """
    common = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in map(str, range(num_processes)):
            arguments = (command, os.environ | common | {"RANK": rank, "LOCAL_RANK": rank}, Path(folder))
            processes.append(CONTEXT.Process(target=run_rank, args=arguments))
            processes[-1].start()
        code = code_of(processes, timeout)
        said = ((Path(folder) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(command, code, *said)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def code_of(processes: list[BaseProcess], timeout: float) -> int:
    """Wait until all have ended; 0, or the code of the first that failed: the others have a moment left then."""
    deadline, left, code = time.monotonic() + timeout, list(processes), 0
    while left and (ended := wait([process.sentinel for process in left], max(0.0, deadline - time.monotonic()))):
        for process in [process for process in left if process.sentinel in ended]:
            process.join()
            left.remove(process)
            if process.exitcode and not code:
                code, deadline = process.exitcode, min(deadline, time.monotonic() + GRACE_SECONDS)
    for process in left:
        process.kill()
        process.join()
    if left and not code:
        raise TimeoutError(f"{len(left)} of {len(processes)} processes still ran after {timeout} s")
    return code


def run_rank(command: tuple[str, ...], environment: dict[str, str], folder: Path) -> None:
    """What one of the processes does: `-m MODULE ARGUMENT…` or `SCRIPT ARGUMENT…`."""
    import torch

    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        with open(folder / name, "ab") as file:
            os.dup2(file.fileno(), stream)
    is_module = command[0] == "-m"
    sys.argv = list(command[is_module:])
    run = runpy.run_module if is_module else runpy.run_path
    run(sys.argv[0], run_name="__main__")


def end_with_parent() -> None:
    """Leave nothing behind where the tests are killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only the processes above have one"
    parent.join()
    os._exit(1)
