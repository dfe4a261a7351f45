"""Layers without initial values of their own: init.py draws them all, each from its own generator."""

import torch.nn.functional as F
from torch import Tensor, nn

from remoe.moe.experts import own_part


class Linear(nn.Linear):
    """A projection, without bias unless asked for."""

    def __init__(self, in_size: int, out_size: int, bias: bool = False) -> None:
        super().__init__(in_size, out_size, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """x W^T + b, with this rank's rows or columns of W where ranks share it."""
        return F.linear(input, own_part(self.weight), self.bias)

    def reset_parameters(self) -> None:
        """Leave the memory as it is: the model draws every parameter once, at the end."""


class Embedding(nn.Embedding):
    """A table of token vectors [V, H]."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is: the model draws every parameter once, at the end."""
