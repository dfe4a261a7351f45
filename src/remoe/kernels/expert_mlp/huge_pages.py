"""Fresh large buffers on huge pages: a weight gradient of 200 MB otherwise costs 50,000 page faults a step."""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import torch
from torch import Tensor

_SMALLEST_BYTES = 4 << 20


def empty_like(tensor: Tensor) -> Tensor:
    """torch.empty_like; on Linux the kernel is asked to back a large CPU buffer with huge pages (advice only)."""
    buffer = torch.empty_like(tensor)
    num_bytes = buffer.numel() * buffer.element_size()
    if buffer.device.type == "cpu" and num_bytes >= _SMALLEST_BYTES:
        first = -(-buffer.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        _madvise()(first, buffer.data_ptr() + num_bytes - first, getattr(mmap, "MADV_HUGEPAGE", 0))
    return buffer


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    if not sys.platform.startswith("linux"):
        return lambda address, length, advice: 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
