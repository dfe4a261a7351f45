"""The same bits each run: torch's deterministic algorithms, and what has to be set beside them."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from remoe.errors import ConfigError, TrainingError
from remoe.training.config import LoopConfig

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED_WORKSPACES = (":4096:8", ":16:8")
"""With any other cuBLAS may sum in another order from call to call."""


@contextmanager
def same_bits(loop: LoopConfig) -> Iterator[None]:
    """With `train.deterministic`, each operation inside gives the same bits each time; torch's settings come back.

    Raises ConfigError where cuBLAS has started without a fixed workspace, TrainingError for an operation that cannot.
    """
    if not loop.deterministic:
        yield
        return
    _fix_workspace()
    with _deterministic_algorithms(), _deterministic_compiler() if loop.compile else nullcontext():
        try:
            yield
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            raise TrainingError(
                f"train.deterministic is true, but {str(error).partition(', but you set')[0]}; set it to false, or "
                "train on the CPU"
            ) from error


def _fix_workspace() -> None:
    """cuBLAS reads it when it starts; so it stays for the rest of the process."""
    if os.environ.get(WORKSPACE) in FIXED_WORKSPACES:
        return
    if torch.cuda.is_initialized():
        raise ConfigError(
            f"train.deterministic is true, but this process has used a GPU before; start it with {WORKSPACE}="
            f"{FIXED_WORKSPACES[0]} in its environment"
        )
    os.environ[WORKSPACE] = FIXED_WORKSPACES[0]


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    was_on = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    before = cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    memory.fill_uninitialized_memory = False  # nothing reads it, and filling takes time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on[0], warn_only=was_on[1])
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = before


def _deterministic_compiler() -> AbstractContextManager[object]:
    """Inductor would choose among kernels by timing them."""
    import torch._inductor.config

    return torch._inductor.config.patch(deterministic=True)
