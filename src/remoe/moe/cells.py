"""The cells that carry router state over depth: (input_TP, state_TP) -> state_TP (RMoE §2.2, §3.15-3.16, §6.8)."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remoe.errors import ConfigError
from remoe.moe.initial import Constant, Initial, Uniform


class Cell(nn.Module):
    """A recurrence over layers. Its state starts with the output h, of width `width`; `state_size` is all of it."""

    def __init__(self, input_size: int, width: int) -> None:
        super().__init__()
        self.input_size = input_size
        self.width = width
        self.state_size = width

    def forward(self, input_TP: Tensor, state_TP: Tensor) -> Tensor:
        """The state after this layer [T, P], in the dtype of the inputs; the state before may be one row for all."""
        raise NotImplementedError


class IdentityCell(Cell):
    """h = u: no memory, so that the exact reduction to ReMoE is a configuration (RMoE §7.3a)."""

    def forward(self, input_TP: Tensor, state_TP: Tensor) -> Tensor:
        """The input; the state is not read."""
        return input_TP


class LeakySumCell(Cell):
    """h = u + leak h: a depth average for one multiplication a value (RMoE §6.8(5)); `leak` may be learned."""

    def __init__(self, input_size: int, width: int, leak: float = 0.5, learned: str = "no") -> None:
        super().__init__(input_size, width)
        self.initial_leak = leak
        shape = {"scalar": (1,), "vector": (width,)}.get(learned)
        self.leak = nn.Parameter(torch.empty(shape)) if shape else leak

    def forward(self, input_TP: Tensor, state_TP: Tensor) -> Tensor:
        """u + leak h."""
        leak = self.leak.to(input_TP.dtype) if isinstance(self.leak, Tensor) else self.leak
        return input_TP + leak * state_TP

    def initial_values(self) -> dict[str, Initial]:
        """Every unit starts with the same leak."""
        return {"leak": Constant(self.initial_leak)}


class WeightedCell(Cell):
    """A cell with torch's packed weights `weight_ih` [gates*P, input], `weight_hh` [gates*P, P] and two biases.

    All start uniform within 1/sqrt(P) as torch's do; `bias` is "library" for that, "zero", or "none".
    """

    num_gates = 1
    num_states = 1

    def __init__(self, input_size: int, width: int, bias: str = "library") -> None:
        super().__init__(input_size, width)
        self.state_size = self.num_states * width
        self.bias = bias
        rows = self.num_gates * width
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size))
        self.weight_hh = nn.Parameter(torch.empty(rows, width))
        self.bias_ih = None if bias == "none" else nn.Parameter(torch.empty(rows))
        self.bias_hh = None if bias == "none" else nn.Parameter(torch.empty(rows))

    def initial_values(self) -> dict[str, Initial]:
        """torch's own start, biases as asked for."""
        uniform = Uniform(1 / math.sqrt(self.width))
        bias = Constant(0.0) if self.bias == "zero" else uniform
        return {"weight_ih": uniform, "weight_hh": uniform, "bias_ih": bias, "bias_hh": bias}

    def from_input(self, input_TP: Tensor) -> Tensor:
        """W u + b of all gates, packed."""
        return affine(input_TP, self.weight_ih, self.bias_ih)

    def from_state(self, h_TP: Tensor) -> Tensor:
        """U h + c of all gates, packed."""
        return affine(h_TP, self.weight_hh, self.bias_hh)


class GRUCell(WeightedCell):
    """torch's GRUCell: the hidden bias is inside the reset product; gates in the order reset, update, new."""

    num_gates = 3

    def forward(self, input_TP: Tensor, state_TP: Tensor) -> Tensor:
        """h' = (1 - z) n + z h (RMoE §2.2)."""
        reset_u, update_u, new_u = self.from_input(input_TP).chunk(3, dim=-1)
        reset_h, update_h, new_h = self.from_state(state_TP).chunk(3, dim=-1)
        new_TP = torch.tanh(new_u + torch.sigmoid(reset_u + reset_h) * new_h)
        return torch.lerp(new_TP, state_TP, torch.sigmoid(update_u + update_h))


class RNNCell(WeightedCell):
    """h' = tanh(W u + b + U h + c)."""

    def forward(self, input_TP: Tensor, state_TP: Tensor) -> Tensor:
        """The next h."""
        return torch.tanh(self.from_input(input_TP) + self.from_state(state_TP))


class LSTMCell(WeightedCell):
    """torch's LSTMCell; the state is [h, c], gates in the order input, forget, cell, output."""

    num_gates = 4
    num_states = 2

    def forward(self, input_TP: Tensor, state_TP: Tensor) -> Tensor:
        """c' = f c + i g and h' = o tanh(c') (RMoE §3.16)."""
        h_TP, c_TP = state_TP.chunk(2, dim=-1)
        write, forget, new, output = (self.from_input(input_TP) + self.from_state(h_TP)).chunk(4, dim=-1)
        c_TP = torch.sigmoid(forget) * c_TP + torch.sigmoid(write) * torch.tanh(new)
        return torch.cat((torch.sigmoid(output) * torch.tanh(c_TP), c_TP), dim=-1)


CELLS: dict[str, type[Cell]] = {
    "gru": GRUCell,
    "rnn": RNNCell,
    "lstm": LSTMCell,
    "leaky": LeakySumCell,
    "identity": IdentityCell,
}


def affine(input_TX: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X W^T + b in the dtype of X, whatever the parameters' is."""
    return F.linear(input_TX, weight.to(input_TX.dtype), None if bias is None else bias.to(input_TX.dtype))


def share_cell(routers: Iterable[nn.Module]) -> Cell | None:
    """Make all recurrent routers use the first one's cell and own none; the caller owns and registers the result.

    None where no router has a cell. Raises ConfigError where the cells differ in their sizes.
    """
    shared: Cell | None = None
    for router in routers:
        cell = getattr(router, "cell", None)
        if not isinstance(cell, Cell):
            continue
        shared = shared or cell
        if (type(cell), cell.input_size, cell.width) != (type(shared), shared.input_size, shared.width):
            raise ConfigError("routers with different cells share one, must have equal cell and sizes")
        del router.cell
        router.__dict__["cell"] = shared  # used but not registered: its parameters have one name, the owner's
    return shared
