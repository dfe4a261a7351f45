"""Layers without initial values of their own: init.py draws them all, each from its own generator."""

from torch import nn


class Linear(nn.Linear):
    """A projection without bias."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__(in_size, out_size, bias=False)

    def reset_parameters(self) -> None:
        """Leave the memory as it is: the model draws every parameter once, at the end."""


class Embedding(nn.Embedding):
    """A table of token vectors [V, H]."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is: the model draws every parameter once, at the end."""
