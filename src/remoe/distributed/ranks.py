"""What a trainer asks of the processes it runs on; `Ranks` is the answer of one that is alone."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result")


class Agreed(NamedTuple):
    """Host-side numbers of one step, the same on all ranks."""

    num_labels: int
    stop_signal: int
    """The number of a signal that some rank got; 0: none."""


class Ranks:
    """One process with all the data. `size` counts data ranks, `index` is this one's number, from 0."""

    index = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what a run leaves on disk."""
        return self.index == 0

    def place(self, model: nn.Module, device: torch.device, param_dtype: torch.dtype | None) -> None:
        """Put the model where it is trained; `param_dtype` is what large matrices compute in, None: as they are."""
        model.to(device)

    def rows(self, batch_size: int, micro_batch: int) -> list[slice]:
        """This rank's rows of a batch, one slice a micro-batch."""
        return [slice(first, first + micro_batch) for first in range(0, batch_size, micro_batch)]

    def agree(self, num_labels: int, stop_signal: int) -> Agreed:
        """Labels of the whole batch, and whether any rank was asked to stop."""
        return Agreed(num_labels, stop_signal)

    def total(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums over ranks of device values, each in its own dtype: counts stay integers."""
        return dict(values)

    def clip_gradients(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm` (0: leave them); returns their norm before that, 0-dim."""
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def on_first(self, action: Callable[[], Result]) -> Result:
        """What the action returns on the first rank, which alone runs it; a RemoeError or OSError is raised on all."""
        return action()

    def gather(self, value: Result) -> list[Result]:
        """Every rank's value, in their order."""
        return [value]
