"""When the processes lose each other: which of them does not answer any more."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from remoe.distributed.world import rank, world_size
from remoe.errors import OneRankError, TrainingError

LONGEST_WAIT_SECONDS = 5.0
"""How long to wait for others to notice the same fault; they were in the same exchange."""
WORDS = ("gloo", "NCCL", "nccl", "Socket", "timed out", "Timed out")


@contextmanager
def named(store: dist.Store, timeout_seconds: float) -> Iterator[None]:
    """Inside, a failed exchange becomes one line about the processes that hang or died. The rest is left as it is.

    Each process that notices leaves a mark in the store; those without one are to blame. The first of the others says
    it (OneRankError), on the rest it is a TrainingError.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_an_exchange(error):
            raise
        missing = _without_a_mark(store, min(LONGEST_WAIT_SECONDS, timeout_seconds))
        if not missing:
            raise
        raise _explained(missing, error) from error


def _is_of_an_exchange(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error) for word in WORDS)


def _without_a_mark(store: dist.Store, wait_seconds: float) -> list[int]:
    """Processes that did not notice the fault in this time; none where the store itself is gone."""
    try:
        store.set(f"fault/{rank()}", "noticed")
        time.sleep(wait_seconds)
        return [other for other in range(world_size()) if not store.check([f"fault/{other}"])]
    except RuntimeError:
        return []


def _explained(missing: list[int], error: RuntimeError) -> TrainingError:
    who = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(map(str, missing))}"
    message = (
        f"{who} of {world_size()} did not answer any more (numbered from 0, as by torchrun); the run ends here, and "
        f"--resume goes on after the last checkpoint. torch says: {str(error).splitlines()[0][:200]}"
    )
    speaks = rank() == min(other for other in range(world_size()) if other not in missing)
    return OneRankError(message) if speaks else TrainingError(message)
