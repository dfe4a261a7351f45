"""The answers of one process of many, which share the model and the rows of each batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from remoe.distributed.config import ParallelConfig
from remoe.distributed.gradients import clip_shared_gradients
from remoe.distributed.mesh import Meshes
from remoe.distributed.ranks import Agreed, Ranks, Result
from remoe.distributed.shard import shard_model
from remoe.errors import RemoeError


class DataRanks(Ranks):
    """One of the processes that share the model and the rows of each batch."""

    def __init__(self, parallel: ParallelConfig, device: torch.device) -> None:
        self.parallel = parallel
        self.meshes = Meshes.build(parallel, device)
        self.index = dist.get_rank()
        self.size = parallel.data_ranks

    def place(self, model: nn.Module, device: torch.device, param_dtype: torch.dtype | None) -> None:
        shard_model(model, self.meshes, self.parallel, param_dtype)

    def rows(self, batch_size: int, micro_batch: int) -> list[slice]:
        """Micro-batch i of all ranks together is rows i*n*m to (i+1)*n*m: those of one process with micro-batches of
        n*m rows.
        """
        first, stride = self.index * micro_batch, self.size * micro_batch
        return [slice(start + first, start + first + micro_batch) for start in range(0, batch_size, stride)]

    def agree(self, num_labels: int, stop_signal: int) -> Agreed:
        own = torch.tensor([num_labels, stop_signal])
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own)
        labels, signals = torch.stack(everyone).unbind(1)
        return Agreed(int(labels.sum()), int(signals.max()))

    def total(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        summed: dict[str, Tensor] = {}
        for dtype in sorted({value.dtype for value in values.values()}, key=str):
            summed |= _total({name: value for name, value in values.items() if value.dtype == dtype})
        return {name: summed[name] for name in values}

    def clip_gradients(self, model: nn.Module, max_norm: float) -> Tensor:
        return clip_shared_gradients(model.parameters(), max_norm, self.parallel.data_replicate)

    def on_first(self, action: Callable[[], Result]) -> Result:
        outcome: list[Any] = [None, None]
        if self.is_first:
            outcome = _outcome(action)
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[1], BaseException):
            raise outcome[1]
        return cast(Result, outcome[0])

    def gather(self, value: Result) -> list[Result]:
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value)
        return everyone


def _outcome(action: Callable[[], Any]) -> list[Any]:
    try:
        return [action(), None]
    except (RemoeError, OSError) as error:
        return [None, error]


def _total(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    flat = torch.cat([value.detach().reshape(-1) for value in values.values()])
    dist.all_reduce(flat)
    parts: Sequence[Tensor] = flat.split([value.numel() for value in values.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(values.items(), parts, strict=True)}
