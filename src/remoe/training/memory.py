"""When the memory of a device is full: one line that says in what, and what needs less."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from remoe.distributed.world import rank, world_size
from remoe.errors import OutOfMemoryError

ON_CPU = "DefaultCPUAllocator: can't allocate memory"
"""In a plain RuntimeError; of a GPU torch has torch.OutOfMemoryError."""
ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")


@contextmanager
def needed_for(work: str, fix: str) -> Iterator[None]:
    """Inside, a device without memory raises OutOfMemoryError: it names the work, and ends with the fix."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(described(error, work, fix)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, or Python, found no memory. By the name of torch's class: this file must not wait for torch."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or ON_CPU in str(error)


def described(error: BaseException, work: str, fix: str) -> str:
    """What was being done where, how much was asked for, and what to do."""
    where = "the CPU" if isinstance(error, MemoryError) or ON_CPU in str(error) else "the GPU"
    who = f"process {rank()}: " if world_size() > 1 else ""
    asked = ASKED.search(str(error))
    more = f", which asked for {asked[1]} more" if asked else ""
    return f"{who}{where} ran out of memory in {work}{more}; {fix}"
