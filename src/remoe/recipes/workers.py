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
from remoe.training.signals import RunStoppedError

POLL_SECONDS = 0.2

Processes = dict["subprocess.Popen[bytes]", tuple[Trial, str]]


def run_in_processes(
    todo: Sequence[Trial], devices: Sequence[str], root: Path, *, overwrite: bool, say: Callable[[str], None]
) -> None:
    """Train each trial as `python -m remoe train` on the next free device; a device may be named more than once.

    One that fails does not stop the others; TrainingError names its log at the end. Interrupting this process
    interrupts the runs, which write a checkpoint, and raises RunStoppedError.
    """
    waiting, workers = list(todo), _Workers(devices, root, overwrite=overwrite, say=say)
    with _terminated_at_the_end(workers.running):
        while waiting or workers.running:
            if waiting and workers.free:
                workers.start(waiting.pop(0))
                continue
            workers.collect()
            time.sleep(POLL_SECONDS)
    if workers.failed:
        name, log = workers.failed[0].config.name, _log(workers.failed[0], root)
        raise TrainingError(
            f"{len(workers.failed)} of {len(todo)} runs failed; the first is {name}: {_last_line(log)} (log: {log})"
        )


class _Workers:
    """The devices that are free, the processes that run, and the trials that failed."""

    def __init__(self, devices: Sequence[str], root: Path, *, overwrite: bool, say: Callable[[str], None]) -> None:
        self.free = list(devices)
        self.running: Processes = {}
        self.failed: list[Trial] = []
        self._root, self._overwrite, self._say = root, overwrite, say
        self._threads = max(1, (os.cpu_count() or 1) // len(devices))

    def start(self, trial: Trial) -> None:
        """Start a trial on a free device."""
        device, log = self.free.pop(0), _log(trial, self._root)
        arguments = _arguments(trial, device, self._root, overwrite=self._overwrite)
        self._say(f"{trial.config.name}: started on {device}, log in {log}")
        self.running[_start(arguments, log, self._threads)] = trial, device

    def collect(self) -> None:
        """Free the devices of the processes that have ended."""
        for process in [process for process in self.running if process.poll() is not None]:
            trial, device = self.running.pop(process)
            self.free.append(device)
            self.failed += [trial] if process.returncode else []
            self._say(f"{trial.config.name}: {'failed' if process.returncode else 'finished'}")


def _arguments(trial: Trial, device: str, root: Path, *, overwrite: bool) -> list[str]:
    config = _log(trial, root).with_suffix(".yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(to_yaml(trial.config), encoding="utf-8")
    flags = ["--overwrite" if overwrite else "--resume", "--no-report", "--root", str(root)]
    return ["train", str(config), *flags, "--set", f"train.device={device}"]


def _start(arguments: Sequence[str], log: Path, threads: int) -> "subprocess.Popen[bytes]":
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "remoe", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={"OMP_NUM_THREADS": str(threads)} | os.environ,
            start_new_session=True,  # Ctrl-C reaches this process alone: a second signal would cut a checkpoint short
        )


@contextmanager
def _terminated_at_the_end(running: Processes) -> Iterator[None]:
    """Whatever ends this process, also SIGTERM, ends the runs that it started: they write a checkpoint and leave."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if is_main else None
    try:
        yield
    except KeyboardInterrupt:
        raise RunStoppedError("stopped; the runs are saved, and the same command goes on", signal.SIGINT) from None
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
