"""Initial values: each parameter from its own generator, so that models which differ in one part share the rest."""

import hashlib
import math

import torch
from torch import Tensor, nn

from remoe.model.config import ReMoEConfig

_OUTPUT_PROJECTIONS = ("o_proj.weight", "down_proj.weight", "experts.down_proj")


@torch.no_grad()
def initialise(model: nn.Module, config: ReMoEConfig, seed: int) -> None:
    """Draw every parameter of the model in place; a model on the meta device stays as it is.

    Norms are 1, all else is N(0, init_std), output projections N(0, init_std / sqrt(2L)) (ReMoE's scripts). A value
    depends on the seed and the parameter's name and shape only, not on the device nor on the rest of the model.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            parameter.copy_(initial_values(name, parameter.shape, config, seed))


def initial_values(name: str, shape: torch.Size, config: ReMoEConfig, seed: int) -> Tensor:
    """The values that a parameter of this name and shape starts with, on the CPU whatever the default device is."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, device="cpu")
    std = config.init_std
    if name.endswith(_OUTPUT_PROJECTIONS):
        std /= math.sqrt(2 * config.num_layers)
    return torch.randn(shape, generator=_generator(seed, name), device="cpu") * std


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
