"""Progress of a long pass over files: a bar on a terminal, a plain line every tenth otherwise."""

import sys
import time
from types import TracebackType
from typing import Any


class FileProgress:
    """Shows on stderr how many bytes of the input are done, and how many documents that made; a context manager."""

    def __init__(self, total_bytes: int, is_shown: bool = True) -> None:
        self._total, self._is_shown = max(total_bytes, 1), is_shown
        self._start = time.monotonic()
        self._tenths = 0
        self._bar: Any = None

    def __enter__(self) -> "FileProgress":
        if self._is_shown and sys.stderr.isatty():
            self._bar = _rich_bar()
            self._bar.start()
            self._task = self._bar.add_task("tokenize", total=self._total, documents=0)
        return self

    def update(self, done_bytes: int, documents: int) -> None:
        """Tell how far the pass has come."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done_bytes, documents=documents)
            return
        tenths = 10 * done_bytes // self._total
        if self._is_shown and tenths > self._tenths:
            self._tenths = tenths
            speed = done_bytes / 1e6 / max(time.monotonic() - self._start, 1e-3)
            line = f"tokenize: {10 * tenths} %, {documents:,} documents, {speed:.1f} MB/s"
            print(line, file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[documents]:,} documents"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
