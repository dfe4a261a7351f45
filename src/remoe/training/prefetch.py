"""Batches made by a thread while the device computes; each is a pure function of its step."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from remoe.data import Batch

DEPTH = 2
"""Batches that are ready or in the making."""


class Prefetch:
    """The batches of `steps` in order, while entered; an error in the making of one is raised when its turn comes.

    For a GPU they are in pinned memory, so that copies to it do not wait.
    """

    def __init__(self, make: Callable[[int], Batch], steps: range, device: torch.device) -> None:
        self._make = make
        self._steps = iter(steps)
        self._is_pinned = device.type == "cuda"
        self._pending: deque[Future[Batch]] = deque()

    def __enter__(self) -> Iterator[Batch]:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        for _ in range(DEPTH):
            self._order()
        return self._batches()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _batches(self) -> Iterator[Batch]:
        while self._pending:
            batch = self._pending.popleft().result()
            self._order()
            yield batch

    def _order(self) -> None:
        """Let the thread make one more, if there is one more."""
        step = next(self._steps, None)
        if step is not None:
            self._pending.append(self._thread.submit(self._prepare, step))

    def _prepare(self, step: int) -> Batch:
        batch = self._make(step)
        return Batch(*(values.pin_memory() for values in batch)) if self._is_pinned else batch
