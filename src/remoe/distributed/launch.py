"""Joining the other processes that torchrun (or a scheduler) started, and leaving them again."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from remoe.distributed import faults
from remoe.distributed.config import ParallelConfig
from remoe.distributed.ranks import Ranks
from remoe.distributed.world import number, rank, world_size
from remoe.errors import ConfigError, OneRankError

SETTLING_SECONDS = 0.1
"""gloo's threads let go of the last tensors only now, for which they need Python: at its end they would abort it."""


def local_device(device: torch.device) -> torch.device:
    """This process's own GPU, by torchrun's LOCAL_RANK; OneRankError where there are not enough."""
    if device.type != "cuda" or world_size() == 1:
        return device
    if device.index is not None:
        raise ConfigError(f"train.device is '{device}', must be auto, cpu or cuda: each process takes its own GPU")
    local = number("LOCAL_RANK", rank())
    if local >= torch.cuda.device_count():
        raise OneRankError(
            f"process {rank()} needs GPU {local} of this host, but torch sees {torch.cuda.device_count()}; "
            "start torchrun with --nproc-per-node equal to the number of GPUs"
        )
    return torch.device("cuda", local)


@contextmanager
def process_group(device: torch.device, timeout_seconds: float) -> Iterator[None]:
    """Inside, the processes can talk: NCCL between GPUs, gloo between hosts. One process alone needs none of it.

    Raises OneRankError or TrainingError, naming it, where a process hangs longer than the timeout or dies.
    """
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_seconds)
    store = _store(timeout)
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=timeout)
    try:
        with faults.named(store, timeout_seconds):
            yield
    finally:
        dist.destroy_process_group()
        time.sleep(SETTLING_SECONDS)


def join(parallel: ParallelConfig, device: torch.device) -> Ranks:
    """The ranks of a resolved section; inside `process_group`."""
    if world_size() == 1:
        return Ranks()
    if parallel.pipeline > 1:  # FSDP takes a while to import
        from remoe.distributed.stage_ranks import StageRanks

        return StageRanks(parallel, device)
    from remoe.distributed.data_ranks import DataRanks

    return DataRanks(parallel, device)


def _store(timeout: timedelta) -> dist.Store:
    """Where the processes find each other. In torchrun's own store, which outlives them, each restart uses names of its
    own: gloo would otherwise read the addresses of the attempt that died. A store of the first process is always new,
    and a torchrun that joined later counts fewer restarts.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {world_size()}, but {' and '.join(missing)} are not set; start with torchrun, "
            "e.g. torchrun --standalone --nproc-per-node 2 -m remoe train CONFIG"
        )
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], number("MASTER_PORT", 0)
    store = dist.TCPStore(
        address, port, world_size(), is_master=not is_torchruns and rank() == 0, timeout=timeout, wait_for_workers=False
    )
    return dist.PrefixStore(f"try{number('TORCHELASTIC_RESTART_COUNT', 0)}", store) if is_torchruns else store
