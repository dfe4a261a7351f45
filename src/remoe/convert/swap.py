"""ReLU gates in the place of a model's Top-K ones: fitted in one forward pass, and compared with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from remoe.convert.relu_gate import ReLUGate, TopKTokens, fit_relu_gate, overlap
from remoe.model import ReMoEForCausalLM
from remoe.moe import moe_layers
from remoe.moe.routing import Routing


class Gates(NamedTuple):
    """The Top-K gates of a model, and how to read and replace what they return."""

    modules: Sequence[nn.Module]
    """One a MoE layer, each with a `weight` [E, H]."""
    read: Callable[[Tensor, Any], TopKTokens]
    """(hidden, output) of a gate to what it did."""
    write: Callable[[Any, Tensor], Any]
    """(output, weights_TE): the output as if these were the gate's."""


def native_gates(model: ReMoEForCausalLM) -> Gates:
    """The gates of our own model."""

    def read(hidden_TH: Tensor, routing: Routing) -> TopKTokens:
        return TopKTokens(hidden_TH.float(), routing.weights_TE.float(), routing.routing_map_TE)

    def write(routing: Routing, weights_TE: Tensor) -> Routing:
        return routing._replace(weights_TE=weights_TE, routing_map_TE=weights_TE > 0)

    return Gates([layer.router for layer in moe_layers(model)], read, write)


@dataclass
class LayerCounts:
    """What one layer's ReLU gate did beside its Top-K gate, on the same hidden states."""

    tokens: int = 0
    active: int = 0
    overlaps: list[float] = field(default_factory=list)

    @property
    def active_experts(self) -> float:
        """A token."""
        return self.active / self.tokens

    @property
    def overlap(self) -> float:
        """The share of the Top-K pairs that are active too."""
        return sum(self.overlaps) / len(self.overlaps)


class StandIns:
    """While open, ReLU gates stand in for a model's Top-K gates.

    The first tokens that pass a gate fit its stand-in, so the layers after it are fitted to what it lets through.
    """

    def __init__(self, gates: Gates) -> None:
        self.gates = gates
        self.fitted: dict[int, ReLUGate] = {}
        self.counts = [LayerCounts() for _ in gates.modules]

    def __enter__(self) -> Self:
        modules = enumerate(self.gates.modules)
        self._hooks = [module.register_forward_hook(self._hook(layer)) for layer, module in modules]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def all_fitted(self) -> list[ReLUGate]:
        """The stand-in of each layer, after a forward pass."""
        return [self.fitted[layer] for layer in range(len(self.gates.modules))]

    def restart_counts(self) -> None:
        """Forget what was counted so far."""
        self.counts = [LayerCounts() for _ in self.gates.modules]

    def _hook(self, layer: int) -> Callable[[Any, tuple[Any, ...], Any], Any]:
        @torch.no_grad()
        def stand_in(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            hidden_TH = inputs[0].reshape(-1, inputs[0].shape[-1])
            tokens = self.gates.read(hidden_TH, output)
            if layer not in self.fitted:
                self.fitted[layer] = fit_relu_gate(module.weight, tokens)
            weights_TE = self.fitted[layer](tokens.hidden_TH)
            self._count(self.counts[layer], weights_TE > 0, tokens.routing_map_TE)
            return self.gates.write(output, weights_TE)

        return stand_in

    def _count(self, counts: LayerCounts, is_open_TE: Tensor, routing_map_TE: Tensor) -> None:
        counts.tokens += len(is_open_TE)
        counts.active += int(is_open_TE.sum())
        counts.overlaps.append(overlap(routing_map_TE, is_open_TE))
