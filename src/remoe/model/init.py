"""Initial values: each parameter from its own generator, so that models which differ in one part share the rest."""

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from remoe.model.config import ReMoEConfig
from remoe.moe.initial import Constant, Initial, Normal, stated_values

_OUTPUT_PROJECTIONS = ("o_proj.weight", "down_proj.weight", "experts.down_proj")


@torch.no_grad()
def initialise(model: nn.Module, config: ReMoEConfig, seed: int) -> None:
    """Draw every parameter of the model in place; a model on the meta device stays as it is.

    Norms are 1, a router's parameters as it states, all else is N(0, init_std), output projections
    N(0, init_std / sqrt(2L)) (ReMoE's scripts). A value depends on the seed and the parameter's name and shape only,
    not on the device nor on the rest of the model.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    for (_, values), parameter in zip(initial_values(model, config, seed), model.parameters(), strict=True):
        parameter.copy_(values)


def initial_values(model: nn.Module, config: ReMoEConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's name and first values, on the CPU, one at a time; the model may be on the meta device."""
    stated = stated_values(model)
    for name, parameter in model.named_parameters():
        initial = stated.get(name) or initial_of(name, config)
        yield name, initial.draw(parameter.shape, _generator(seed, name))


def initial_of(name: str, config: ReMoEConfig) -> Initial:
    """How a parameter of this name starts where its module states nothing."""
    if name.endswith("norm.weight"):
        return Constant(1.0)
    if name.endswith(_OUTPUT_PROJECTIONS):
        return Normal(config.init_std / math.sqrt(2 * config.num_layers))
    return Normal(config.init_std)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
