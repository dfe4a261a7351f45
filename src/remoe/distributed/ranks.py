"""What a trainer asks of the processes it runs on; `Ranks` is the answer of one that is alone."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import torch.distributed as dist

    from remoe.distributed.config import Graph
    from remoe.distributed.optimizer_shards import Share
    from remoe.distributed.pipeline import Pipeline

Result = TypeVar("Result")
Key = TypeVar("Key")
Item = TypeVar("Item")


class Ranks:
    """One process with all the data. `size` counts all ranks, `index` is this one's number, from 0."""

    index = 0
    size = 1
    data_size = 1
    """Ranks with different rows of a batch; the others share the tokens of a sequence."""
    sequence_size = 1
    same_rows = 1
    """Ranks with the same rows of a batch: those that share its sequences, in each stage of a pipeline."""
    graph: "Graph" = "whole"
    """ParallelConfig.graph."""
    shares: "Mapping[nn.Parameter, Share] | None" = None
    """How the fp32 weights of a placed model's parameters are shared by ranks that hold it whole; None: they do not."""
    pipeline: "Pipeline | None" = None
    """This rank's place among the stages that share the layers; None: it has all layers."""
    group: "dist.ProcessGroup | None" = None
    """What objects and files are exchanged through; None: the process group that all use."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes what a run leaves on disk."""
        return self.index == 0

    def aside(self) -> "Ranks":
        """The same ranks for a thread: `on_first` and `gather` never wait for what others exchange meanwhile."""
        return self

    def place(self, model: nn.Module, device: torch.device, param_dtype: torch.dtype | None) -> None:
        """Put the model where it is trained; `param_dtype` is what large matrices compute in, None: as they are."""
        model.to(device)

    def columns(self, length: int) -> slice:
        """This rank's tokens of a sequence of this length."""
        return slice(0, length)

    def rows(self, batch_size: int, micro_batch: int) -> list[slice]:
        """This rank's rows of a batch, one slice a micro-batch."""
        return [slice(first, first + micro_batch) for first in range(0, batch_size, micro_batch)]

    def seed_step(self, seed: int, step: int) -> None:
        """Let each rank draw its own dropout and noise, a function of (seed, step, rank)."""

    def total(self, values: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """The sums over ranks of device values, each in its own dtype: counts stay integers."""
        return dict(values)

    def total_of_layers(self, values: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """The sums over those ranks that have the same layers as this one."""
        return dict(values)

    def largest_of_layers(self, values: Tensor) -> Tensor:
        """The largest of each device value of those ranks that have the same layers as this one."""
        return values

    def average(self, values: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """The means over ranks of device values; where ranks have different layers, of what those add up to."""
        return dict(values)

    def collect(self, number: float, device: torch.device) -> Tensor:
        """The numbers of all processes in their order, on the device and without waiting for it."""
        return torch.full((1,), number, dtype=torch.float64, device=device)

    def total_number(self, number: int) -> int:
        """The sum over ranks of a number on the host."""
        return number

    def largest_number(self, number: int) -> int:
        """The largest of the ranks' numbers on the host."""
        return number

    def evaluate(self, model: nn.Module, tokens_BS: Tensor, *inputs: Any, **options: Any) -> Any:
        """What the model returns, without a backward pass; of a part of the model, what it adds to the whole."""
        return model(tokens_BS, *inputs, **options)

    def share_out(self, batches: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
        """Batches for this rank to evaluate, and whether each counts: all ranks get equally many, so that they
        compute together, and the last of some is another rank's.
        """
        return ((batch, True) for batch in batches)

    def complete_gradients(self) -> None:
        """Add up the gradients of parameters that several parts of a model have; once a step, before clipping."""

    def clip_gradients(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm` (0: leave them); returns their norm before that, 0-dim."""
        parameters = [p for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def on_first(self, action: Callable[[], Result]) -> Result:
        """What the action returns on the first rank, which alone runs it; a RemoeError or OSError is raised on all."""
        return action()

    def in_turn(self, action: Callable[[], Result]) -> Result:
        """What the action returns: the first rank's turn comes first, so that the others find what it left on disk."""
        return action()

    def gather(self, value: Result) -> list[Result]:
        """Every rank's value, in their order."""
        return [value]
