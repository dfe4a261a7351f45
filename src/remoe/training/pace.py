"""Which process holds the others up: how long each one works for itself, without what it waits for.

All processes of a run take the same time for a step, for each waits for the slowest. What differs is the time of their
own work: of attention and experts between the exchanges, in the forward pass of a logged step, and the wait for the
next batch. Where a pass is one graph, it is that of the backward pass as a whole, which waits for no other process
unless ranks share experts. A GPU marks the times on its stream and they are read one logged step later, so that no step
waits.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median_low
from typing import Any, TypeVar

import torch
from torch import nn

from remoe.model import ReMoEForCausalLM
from remoe.model.sequence import WHOLE
from remoe.moe import MoE

Item = TypeVar("Item")


class HostMark:
    """A moment of the host, with the methods of a CUDA event; it has always passed."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        """True."""
        return True

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this moment to another."""
        return 1000 * (end_event.seconds - self.seconds)


class Pace:
    """Times the own work of one of several processes. Must be built after the model is spread over them.

    With `is_one_graph` that is what is done inside `span`: hooks do not go into a graph.
    """

    def __init__(self, model: ReMoEForCausalLM, device: torch.device, is_one_graph: bool = False) -> None:
        self._device = device
        self._is_on = False
        self._begun: list[Any] = []
        self._spans: list[tuple[Any, Any]] = []  # HostMarks or CUDA events
        self._waits: list[float] = []
        self._seconds = float("nan")
        for module in () if is_one_graph else work_without_exchange(model):
            module.register_forward_pre_hook(self._begin)  # after FSDP's, which gathers the parameters
            module.register_forward_hook(self._end, prepend=True)

    @property
    def seconds(self) -> float:
        """Own work of one step, as last measured and passed; NaN before that."""
        if self._spans and not self._is_on and self._spans[-1][1].query():
            work = sum(begun.elapsed_time(ended) for begun, ended in self._spans) / 1000
            self._seconds = work + (sum(self._waits) / len(self._waits) if self._waits else 0.0)
            self._spans, self._waits = [], []
        return self._seconds

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Time the forward passes inside, in place of those of a step before."""
        self._spans, self._is_on = [], True
        yield
        self._is_on = False

    @contextmanager
    def span(self) -> Iterator[None]:
        """Own work of a step that is measured."""
        self._begin()
        yield
        self._end()

    def waiting_for(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches; the time until each comes counts."""
        since = time.perf_counter()
        for batch in batches:
            self._waits.append(time.perf_counter() - since)
            yield batch
            since = time.perf_counter()

    def _begin(self, *hooked: object) -> None:
        if self._is_on:
            self._begun.append(self._mark())

    def _end(self, *hooked: object) -> None:
        if self._is_on:
            self._spans.append((self._begun.pop(), self._mark()))

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return HostMark()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def work_without_exchange(model: ReMoEForCausalLM) -> Iterator[nn.Module]:
    """The modules of a model whose forward pass waits for no other process, once their parameters are there."""
    layers: Any = model.model.present_layers()
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield from [attention] if getattr(attention, "sequence", WHOLE) is WHOLE else attention.children()
        yield mlp.experts if isinstance(mlp, MoE) else mlp


def slowest(seconds: Sequence[float] | None) -> Mapping[str, Any]:
    """`slowest_rank` and `slowest_ratio`, its own work over the median; nothing unless all of several are known."""
    if seconds is None or len(seconds) < 2 or any(value != value for value in seconds):
        return {}
    longest = max(seconds)
    return {"slowest_rank": seconds.index(longest), "slowest_ratio": longest / max(median_low(seconds), 1e-9)}
