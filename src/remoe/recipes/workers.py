"""Runs spread over devices: each a process of its own, its output in a log file."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from remoe.config import to_yaml
from remoe.errors import TrainingError
from remoe.recipes.plan import Trial

POLL_SECONDS = 0.2


def run_in_processes(
    todo: Sequence[Trial], devices: Sequence[str], root: Path, *, overwrite: bool, say: Callable[[str], None]
) -> None:
    """Train each trial as `python -m remoe train` on the next free device; a device may be named more than once.

    One that fails does not stop the others; TrainingError names its log at the end. Interrupting this process
    interrupts the runs, which write a checkpoint.
    """
    waiting, free, failed = list(todo), list(devices), []
    running: dict[subprocess.Popen[bytes], tuple[Trial, str]] = {}
    with _terminated_at_the_end(running):
        while waiting or running:
            while waiting and free:
                trial, device = waiting.pop(0), free.pop(0)
                say(f"{trial.config.name}: started on {device}, log in {_log(trial, root)}")
                arguments = _arguments(trial, device, root, overwrite=overwrite)
                running[_start(arguments, _log(trial, root), len(devices))] = trial, device
            for process in [process for process in running if process.poll() is not None]:
                trial, device = running.pop(process)
                free.append(device)
                failed += [trial] if process.returncode else []
                say(f"{trial.config.name}: {'failed' if process.returncode else 'finished'}")
            time.sleep(POLL_SECONDS)
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(todo)} runs failed; the first is {failed[0].config.name}: "
            f"{_last_line(_log(failed[0], root))} (log: {_log(failed[0], root)})"
        )


def _arguments(trial: Trial, device: str, root: Path, *, overwrite: bool) -> list[str]:
    config = _log(trial, root).with_suffix(".yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(to_yaml(trial.config), encoding="utf-8")
    flags = ["--overwrite" if overwrite else "--resume", "--no-report", "--root", str(root)]
    return ["train", str(config), *flags, "--set", f"train.device={device}"]


def _start(arguments: Sequence[str], log: Path, num_workers: int) -> "subprocess.Popen[bytes]":
    threads = str(max(1, (os.cpu_count() or 1) // num_workers))
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "remoe", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={"OMP_NUM_THREADS": threads} | os.environ,
            start_new_session=True,  # Ctrl-C reaches this process alone: a second signal would cut a checkpoint short
        )


@contextmanager
def _terminated_at_the_end(running: dict["subprocess.Popen[bytes]", tuple[Trial, str]]) -> Iterator[None]:
    """Whatever ends this process, also SIGTERM, ends the runs that it started: they write a checkpoint and leave."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if is_main else None
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _log(trial: Trial, root: Path) -> Path:
    folder, _, name = trial.config.name.rpartition("/")
    return root / folder / "logs" / f"{name}.log"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "no output"
