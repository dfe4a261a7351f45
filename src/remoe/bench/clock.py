"""Times and memory of one call, on a GPU by its own clock and from a cold cache."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

GIB = 2**30
_L2_BYTES = 256 << 20
_MOST_REPEATS, _FEWEST_REPEATS, _WARM_UP = 20, 5, 3
_BUDGET_MS = 400.0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes above what was allocated before the call."""

    held: int
    """Between forward and backward pass, the output included."""
    peak: int
    """At the worst moment of both, the weights' gradients included."""


class Clock:
    """Median milliseconds of calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self._flush = torch.empty(_L2_BYTES, dtype=torch.int8, device=device) if self.is_cuda else None

    def median_ms(self, call: Callable[[], Any], warm_up: int = _WARM_UP) -> float:
        """Median of 5 to 20 calls (fewer when slow); before each on a GPU, the L2 cache is overwritten."""
        for _ in range(warm_up):
            call()
        self.synchronize()
        once = self._times(call, 1)[0]
        repeats = max(_FEWEST_REPEATS, min(_MOST_REPEATS, int(_BUDGET_MS / max(once, 1e-6))))
        return statistics.median(self._times(call, repeats))

    def medians_in_turn_ms(self, calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
        """Medians of calls that are made one after the other, round by round, so that a slow minute hits them all."""
        for call in calls:
            call()
        self.synchronize()
        times = [[self._times(call, 1)[0] for call in calls] for _ in range(rounds)]
        return [statistics.median(of_call) for of_call in zip(*times, strict=True)]

    def captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call as one CUDA graph, to be replayed: its time without that of launching kernel by kernel."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()

        def replay() -> Any:
            graph.replay()
            return results

        return replay

    def first_seconds(self, call: Callable[[], Any]) -> float:
        """Seconds of a first call, compilation and all."""
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def memory(self, forward: Callable[[], Any], backward: Callable[[Any], Any]) -> Memory | None:
        """What one forward and backward pass allocates; None on a CPU, whose allocator keeps no count."""
        if not self.is_cuda:
            return None
        free(self.device)
        base = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        out = forward()
        held = torch.cuda.memory_allocated(self.device) - base
        backward(out)
        return Memory(held=held, peak=torch.cuda.max_memory_allocated(self.device) - base)

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def _times(self, call: Callable[[], Any], repeats: int) -> list[float]:
        if self._flush is None:
            return [_seconds(call) * 1e3 for _ in range(repeats)]
        events = []
        for _ in range(repeats):
            self._flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            events.append((start, end))
        self.synchronize()
        return [start.elapsed_time(end) for start, end in events]


def free(device: torch.device) -> None:
    """Return what nobody uses to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
