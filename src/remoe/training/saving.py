"""Checkpoints written while training goes on: a copy of the state in host memory, and a thread that writes it.

Training waits for the copy only. One checkpoint is written at a time: the next one, and the end of the run, wait for
it. Several processes write together; what their threads exchange goes through a process group of its own.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor

from remoe.distributed.ranks import Ranks
from remoe.errors import RemoeError
from remoe.training import checkpoint


class Kept(NamedTuple):
    """Which checkpoints stay once a new one is complete."""

    newest: int
    best_step: int | None


class CheckpointSaver:
    """Writes the checkpoints of a folder, while entered. All ranks enter, save and leave together."""

    def __init__(self, folder: Path, ranks: Ranks, report: Callable[[str], None]) -> None:
        self._folder = folder
        self._ranks = ranks.aside()
        self._report = report
        self._stager: Any = None
        self._written: Future[None] | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the checkpoint in the making cannot be completed: `wait` then raises why, on all ranks."""
        return self._written is not None and self._written.done() and self._written.exception() is not None

    def save(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any], kept: Kept, *, wait: bool = False) -> None:
        """Begin to write these values as they are now: they may change as soon as this returns.

        Waits for the checkpoint before; with `wait` also for this one, which then needs no copy. Raises NoRoomError on
        all ranks where what it waited for could not be written.
        """
        self.wait()
        values = tensors if wait else self._copies(tensors)
        self._written = self._thread.submit(self._write, values, dict(record), kept)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return once all is on disk; raises NoRoomError on all ranks where the disk of one is full or fails."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def _copies(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors in host memory, which is used again by the next checkpoint: pinned, for those of a GPU."""
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        if self._stager is None:
            on_gpu = any(tensor.is_cuda for tensor in tensors.values())
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=on_gpu,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=on_gpu,
                )
            )
        return self._stager.stage({name: tensor.detach() for name, tensor in tensors.items()})

    def _write(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any], kept: Kept) -> None:
        checkpoint.write(self._folder, tensors, record, self._ranks)
        self._ranks.on_first(lambda: checkpoint.prune(self._folder, kept.newest, kept.best_step))

    def __enter__(self) -> "CheckpointSaver":
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            if isinstance(failure, RemoeError):  # else the ranks lost each other, which is the error already
                self._report(str(failure))
        finally:
            self._thread.shutdown()
            if self._stager is not None:
                self._stager.close()
