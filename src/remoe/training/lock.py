"""One process at a time trains in a run's folder: a lock that the system lets go of however that process ends."""

import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from remoe.errors import ConfigError, RemoeWarning

LOCK = ".lock"
RETRY_SECONDS = 0.1


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Keep other processes from training in this folder, made if missing; ConfigError, naming it, if one does already.

    On leaving, the lock's file goes, and with it the folders that were made for it and are still empty.
    """
    made = [place for place in (path, *path.parents) if not place.exists()]
    file = _acquire(path)
    try:
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}\n")
        file.flush()
        yield
    finally:
        _release(file, path / LOCK)
        with suppress(OSError):  # the first one that is not empty, or that another process needs, ends it
            for place in made:
                place.rmdir()


def check_free(path: Path) -> None:
    """Raise ConfigError where a process trains in this run's folder."""
    if is_held(path):
        raise _held_error(path)


def is_held(path: Path) -> bool:
    """Whether a process trains in this run's folder. False where the file system has no locks to ask."""
    try:
        with (path / LOCK).open(encoding="utf-8") as file:
            return not _try_lock(file, shared=True)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _acquire(path: Path) -> TextIO:
    while True:
        path.mkdir(parents=True, exist_ok=True)
        try:
            file = (path / LOCK).open("a+", encoding="utf-8")
        except FileNotFoundError:  # the holder before has just removed the folder
            continue
        if not _try_lock(file) and not _try_lock_again(file):
            file.close()
            raise _held_error(path)
        if _is_at(file, path / LOCK):
            return file
        file.close()


def _try_lock_again(file: TextIO) -> bool:
    """Asking whether a lock is held takes it for a moment, which must not turn a run away."""
    time.sleep(RETRY_SECONDS)
    return _try_lock(file)


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether the locked file is still the one of this name: the holder before may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _held_error(path: Path) -> ConfigError:
    pid, _, host = _read(path / LOCK).partition(" ")
    holder = f"process {pid}" if pid else "another process"
    where = "" if host in ("", socket.gethostname()) else f" on {host}"
    return ConfigError(f"run {path} is being trained by {holder}{where}; wait for it, stop it, or choose another name")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:  # released since
        return ""


if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: TextIO, *, shared: bool = False) -> bool:
        file.seek(1 << 20)  # a locked byte cannot be read by others: one past the text
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _release(file: TextIO, path: Path) -> None:
        file.close()
        with suppress(PermissionError):  # the next holder has it open, and an open file stays
            path.unlink(missing_ok=True)
else:
    import fcntl

    def _try_lock(file: TextIO, *, shared: bool = False) -> bool:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # some network file systems have no locks
            if not shared:
                warnings.warn(
                    f"{file.name} cannot be locked ({error.strerror}): train this run once at a time",
                    RemoeWarning,
                    stacklevel=4,
                )
        return True

    def _release(file: TextIO, path: Path) -> None:
        path.unlink(missing_ok=True)  # before the lock goes, so that it is never the next holder's
        file.close()
