"""Forward and backward of a micro-batch as a CUDA graph: one launch instead of thousands.

A graph holds for one set of row capacities: with another it is captured anew, and steps with exact rows run outside it.
Gradients are added up in place, in memory that stays; everything that changes from step to step is copied into the
graph's own inputs.
"""

import gc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from remoe.data import Batch
from remoe.errors import ConfigError
from remoe.moe import MoE
from remoe.moe.experts import GroupedExperts
from remoe.training.micro_batch import Measured, Weighing

Pass = Callable[[Batch, Weighing], Measured]
"""Forward and backward of a micro-batch: adds to the gradients, returns what it measured."""


class Captured(NamedTuple):
    """A graph, where it reads its inputs, and where it leaves what it measured."""

    capacities: Sequence[int]
    graph: Any
    inputs: tuple[Batch, Weighing]
    measured: Measured


class GraphedPass:
    """A pass that replays a graph. `forget` zeroes the gradients; called when capturing has left something in them."""

    def __init__(self, run: Pass, device: torch.device, forget: Callable[[], None]) -> None:
        self._run = run
        self._device = device
        self._forget = forget
        self._captured: Captured | None = None

    def prepare(self, capacities: Sequence[int], batch: Batch, weighing: Weighing) -> None:
        """Capture for these capacities, unless that is done. The inputs are a micro-batch like those to come."""
        if self._captured is None or self._captured.capacities != capacities:
            self.release()
            self._captured = self._capture(capacities, batch, weighing)

    def release(self) -> None:
        """Give the graph's memory back: a pass outside it needs as much."""
        if self._captured is not None:
            self._captured = None
            gc.collect()
            torch.cuda.empty_cache()

    def __call__(self, batch: Batch, weighing: Weighing) -> Measured:
        """Replay the graph on these inputs; nothing waits."""
        assert self._captured is not None, "prepare comes first"
        copy_into(self._captured.inputs, (batch, weighing))
        self._captured.graph.replay()
        return copied(self._captured.measured)

    def _capture(self, capacities: Sequence[int], batch: Batch, weighing: Weighing) -> Captured:
        inputs = copied((batch, weighing))
        random = torch.cuda.get_rng_state(self._device)
        self._warm_up(inputs)
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that prepares batches may pin memory meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            measured = self._run(*inputs)
        torch.cuda.set_rng_state(random, self._device)
        self._forget()
        return Captured(capacities, graph, inputs, measured)

    def _warm_up(self, inputs: tuple[Batch, Weighing]) -> None:
        """Compile and choose kernels, and make the gradients that the graph adds to, on a stream of its own."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run(*inputs)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()  # what the passes so far have used is needed again, in the graph's own pool


def check_capturable(device: torch.device, layers: Sequence[MoE]) -> None:
    """Raise ConfigError where a step cannot become a graph: there is no GPU, or a layer waits for it."""
    if device.type != "cuda":
        raise ConfigError(f"train.cuda_graphs is true, must be false on device {device}: graphs are a GPU's")
    for layer in layers:
        if type(layer.experts) is not GroupedExperts:
            raise ConfigError(
                f"train.cuda_graphs is true, must be false with router {layer.config.router_name!r} and "
                f"{layer.config.experts} experts, which wait for sizes that the GPU computes"
            )


def copied(values: Any) -> Any:
    """The same structure with copies of its tensors."""
    return pytree.tree_map_only(Tensor, torch.clone, values)


def copy_into(targets: Any, sources: Any) -> None:
    """Copy tensors into those at the same places of another structure."""
    for target, source in zip(pytree.tree_leaves(targets), pytree.tree_leaves(sources), strict=True):
        if isinstance(target, Tensor):
            target.copy_(source, non_blocking=True)
