"""The answers of one process of many, which share the model and the rows of each batch."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from datetime import timedelta
from itertools import islice
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from remoe.distributed.config import ParallelConfig
from remoe.distributed.gradients import clip_shared_gradients
from remoe.distributed.mesh import Meshes
from remoe.distributed.optimizer_shards import share_optimizer
from remoe.distributed.ranks import Item, Key, Ranks, Result
from remoe.distributed.shard import shard_model
from remoe.distributed.sums import largest_over, total_over
from remoe.errors import OneRankError, RemoeError
from remoe.model.sequence import own_columns


class DataRanks(Ranks):
    """One of the processes that share the model and the rows of each batch."""

    def __init__(self, parallel: ParallelConfig, device: torch.device) -> None:
        self.parallel = parallel
        self.meshes = Meshes.build(parallel, device)
        self.index = dist.get_rank()
        self.data_size, self.sequence_size = parallel.data_ranks, parallel.sequence_ranks
        self.same_rows = self.sequence_size
        self.size = self.data_size * self.sequence_size
        self.data_index, self.sequence_index = divmod(self.index % self.size, self.sequence_size)
        self.graph = parallel.graph

    def aside(self) -> "DataRanks":
        other = copy(self)
        other.group = cast(
            dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timedelta(seconds=self.parallel.timeout))
        )
        return other

    def place(self, model: nn.Module, device: torch.device, param_dtype: torch.dtype | None) -> None:
        if self.parallel.sharded == "optimizer":
            model.to(device)
            self.shares = share_optimizer(model, self.meshes, self.parallel)
        else:
            shard_model(model, self.meshes, self.parallel, param_dtype)

    def columns(self, length: int) -> slice:
        return own_columns(length, self.sequence_index, self.sequence_size)

    def rows(self, batch_size: int, micro_batch: int) -> list[slice]:
        """Micro-batch i of all n data ranks together is rows i*n*m to (i+1)*n*m: those of one process with
        micro-batches of n*m rows.
        """
        first, stride = self.data_index * micro_batch, self.data_size * micro_batch
        return [slice(start + first, start + first + micro_batch) for start in range(0, batch_size, stride)]

    def seed_step(self, seed: int, step: int) -> None:
        digest = hashlib.sha256(f"{seed}:{step}:{self.index}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def total(self, values: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        return total_over(values, None)

    def total_of_layers(self, values: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        return self.total(values)

    def largest_of_layers(self, values: Tensor) -> Tensor:
        return largest_over(values, None)

    def average(self, values: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        return self.total({name: value / self.size for name, value in values.items()})

    def collect(self, number: float, device: torch.device) -> Tensor:
        numbers = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device)
        numbers[dist.get_rank()].fill_(number)
        dist.all_reduce(numbers)
        return numbers

    def total_number(self, number: int) -> int:
        return _on_host(number, dist.ReduceOp.SUM)

    def largest_number(self, number: int) -> int:
        return _on_host(number, dist.ReduceOp.MAX)

    def share_out(self, batches: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
        remaining = iter(batches)
        while turn := list(islice(remaining, self.data_size)):
            has_own = self.data_index < len(turn)
            yield turn[self.data_index if has_own else -1], has_own

    def clip_gradients(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        return clip_shared_gradients(parameters, max_norm, self.parallel.data_replicate)

    def on_first(self, action: Callable[[], Result]) -> Result:
        outcome: list[Any] = [None, None]
        if self.is_first:
            outcome = _outcome(action)
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if isinstance(outcome[1], BaseException):
            raise outcome[1]
        return cast(Result, outcome[0])

    def in_turn(self, action: Callable[[], Result]) -> Result:
        done: list[Result] = []
        self.on_first(lambda: done.append(action()))
        try:
            return done[0] if done else action()
        except RemoeError as error:
            raise OneRankError(f"process {self.index}: {error}") from error

    def gather(self, value: Result) -> list[Result]:
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.group)
        return everyone


def _outcome(action: Callable[[], Any]) -> list[Any]:
    try:
        return [action(), None]
    except (RemoeError, OSError) as error:
        return [None, error]


def _on_host(number: int, operation: Any) -> int:
    value = torch.tensor(number)
    dist.all_reduce(value, operation)
    return int(value)
