"""Checkpoints written while training goes on: a copy of the state in host memory, and a thread that writes it.

Training waits for the copy only. One checkpoint is written at a time: the next one, and the end of the run, wait for
it. Several processes write together; what their threads exchange goes through a process group of its own.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

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
        self._copies = HostCopies()
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


class HostCopies:
    """Copies of tensors in host memory, which is used again by the next checkpoint: pinned, for those of a GPU."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the values as they are now; a DTensor's is one again, with this rank's part in host memory."""
        copies = {name: self._copy(name, tensor.detach()) for name, tensor in tensors.items()}
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return copies

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        host = self._memory.get(name)
        if host is None or (host.shape, host.dtype) != (local.shape, local.dtype):
            host = self._memory[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        host.copy_(local, non_blocking=True)
        # from_local would move it to the mesh's device
        return DTensor(host, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else host  # pyright: ignore
