"""SIGINT and SIGTERM as a request to stop after the current step; a second SIGINT stops at once.

A second SIGTERM does nothing: schedulers send it to torchrun and to its workers, and torchrun passes it on.
"""

import signal
import threading
from types import FrameType

from remoe.errors import RemoeError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunStoppedError(RemoeError):
    """A run that a signal stopped after a checkpoint. Exit code: 128 + the signal's number, as shells have it."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopRequest:
    """While entered, remembers the first signal instead of dying of it. Handlers are put back on leaving.

    Python delivers signals to the main thread only; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, object] = {}

    @property
    def name(self) -> str:
        """The signal's name, e.g. SIGTERM."""
        return signal.Signals(self.number).name if self.number is not None else ""

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore(*SIGNALS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        self._restore(signal.SIGINT)

    def _restore(self, *numbers: int) -> None:
        for number in numbers:
            if number in self._previous:
                signal.signal(number, self._previous.pop(number))  # pyright: ignore[reportArgumentType]
