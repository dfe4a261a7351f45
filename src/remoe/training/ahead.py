"""Steps whose layers do not wait for their number of rows: the host learns one step late whether the rows sufficed.

Rows are allocated by the counts of earlier steps. A step that needs more is void and leaves no trace, nor does the one
that was started meanwhile; both are run again, in order, from the same random state, with as many rows as they need.
So weights and metrics are those of a run that always waits.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from remoe.data import Batch
from remoe.training.capacity import RowCapacity
from remoe.training.micro_batch import Values
from remoe.training.readout import Readout
from remoe.training.resume import random_state, set_random_state
from remoe.training.step import Stepper


class Launched(NamedTuple):
    """A step that the device has been given."""

    step: int
    batch: Batch
    random: Mapping[str, Tensor]
    """The generators' states before it."""
    readout: Readout
    """What it measured."""


class RunAhead:
    """Gives the device steps, and tells which ones count. `take` runs a step on a batch: (batch, step) → its values.

    Without `capacity` a step counts as soon as it is launched. With it a step counts once the next one is launched, or
    in `settle`.
    """

    def __init__(self, stepper: Stepper, take: Callable[[Batch, int], Values], capacity: RowCapacity | None) -> None:
        self._stepper = stepper
        self._take = take
        self._capacity = capacity
        self._launched: deque[Launched] = deque()

    def launch(self, batch: Batch, step: int) -> list[Launched]:
        """Start a step; returns those that are now known to count, in order."""
        capacities = self._capacity.capacities if self._capacity else None
        self._launched.append(self._start(batch, step, capacities))
        return self._finish(leave=1 if self._capacity else 0)

    def settle(self) -> list[Launched]:
        """Wait for what is launched; returns the steps that now count, so that model and optimizer are theirs."""
        return self._finish(leave=0)

    def _start(self, batch: Batch, step: int, capacities: Sequence[int] | None) -> Launched:
        random = random_state(self._stepper.device)
        self._stepper.row_capacities = capacities
        return Launched(step, batch, random, Readout(self._take(batch, step)))

    def _finish(self, leave: int) -> list[Launched]:
        finished = []
        while len(self._launched) > leave:
            if self._capacity is not None:
                self._learn(self._capacity)
            finished.append(self._launched.popleft())
        return finished

    def _learn(self, capacity: RowCapacity) -> None:
        """Wait for the first launched step's counts; run all again if it is void."""
        if self._launched[0].readout.read()["overflowed"]:
            self._run_again()
        capacity.see([int(count) for count in self._launched[0].readout.read()["needs"]])

    def _run_again(self) -> None:
        void, self._launched = self._launched, deque()
        self._stepper.overflowed.zero_()
        set_random_state(void[0].random, self._stepper.device)
        self._launched.extend(self._start(launched.batch, launched.step, None) for launched in void)


def row_policy(stepper: Stepper) -> RowCapacity | None:
    """The choice of row capacities that `train.rows` asks for; None: exact."""
    rows = stepper.config.train.rows
    is_exact = rows == "exact" or (rows == "auto" and stepper.device.type != "cuda")
    if is_exact or stepper.config.model.num_moe_layers == 0:  # a stage without experts goes the way of the others
        return None
    tokens = stepper.micro_batch * stepper.config.data.sequence_length
    return RowCapacity(tokens * stepper.config.model.moe.routed_experts)
