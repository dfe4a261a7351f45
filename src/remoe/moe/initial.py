"""How a parameter's first values are drawn, as data: a router states it, the layer and the model draw it."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn


class Normal(NamedTuple):
    """Normal around 0."""

    std: float

    def draw(self, shape: torch.Size, generator: torch.Generator | None = None) -> Tensor:
        """A tensor of this shape on the CPU."""
        return torch.randn(shape, generator=generator, device="cpu") * self.std


class Uniform(NamedTuple):
    """Uniform between -bound and bound."""

    bound: float

    def draw(self, shape: torch.Size, generator: torch.Generator | None = None) -> Tensor:
        """A tensor of this shape on the CPU."""
        return (torch.rand(shape, generator=generator, device="cpu") * 2 - 1) * self.bound


class Constant(NamedTuple):
    """The same value everywhere."""

    value: float

    def draw(self, shape: torch.Size, generator: torch.Generator | None = None) -> Tensor:
        """A tensor of this shape on the CPU."""
        return torch.full(shape, self.value, device="cpu")


class Orthogonal(NamedTuple):
    """Rows (or columns, where there are fewer of them) orthogonal, each of length `gain`."""

    gain: float

    def draw(self, shape: torch.Size, generator: torch.Generator | None = None) -> Tensor:
        """A tensor of this shape on the CPU."""
        return nn.init.orthogonal_(  # pyright: ignore[reportUnknownMemberType]
            torch.empty(shape, device="cpu"), gain=self.gain, generator=generator
        )


Initial = Normal | Uniform | Constant | Orthogonal


@runtime_checkable
class StatesInitial(Protocol):
    """A module that says how its parameters start: by name below it; those it leaves out are N(0, init_std)."""

    def initial_values(self) -> Mapping[str, Initial]: ...


def stated_values(module: nn.Module) -> dict[str, Initial]:
    """What a module and all modules below it state, by name below it."""
    parts = cast(Iterable[tuple[str, nn.Module]], module.named_modules())
    return {
        f"{prefix}.{name}" if prefix else name: initial
        for prefix, part in parts
        if isinstance(part, StatesInitial)
        for name, initial in part.initial_values().items()
    }


@torch.no_grad()
def reset(module: nn.Module, init_std: float) -> None:
    """Draw a module's parameters as it and its parts state, the others N(0, init_std), from the global generator."""
    stated = stated_values(module)
    for name, parameter in module.named_parameters():
        initial = stated.get(name) or Normal(init_std)
        if not parameter.is_meta:
            parameter.copy_(initial.draw(parameter.shape))
