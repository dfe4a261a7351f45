"""How many processes there are and which one this is, from torchrun's environment; no torch, so cheap to ask."""

import os

from remoe.errors import ConfigError


def world_size() -> int:
    """How many processes were started together; 1 for a plain start."""
    return number("WORLD_SIZE", 1)


def rank() -> int:
    """This process's number among them, from 0."""
    return number("RANK", 0)


def is_first() -> bool:
    """Whether this process speaks and writes for all."""
    return rank() == 0


def number(name: str, otherwise: int) -> int:
    """An environment variable that torchrun sets."""
    text = os.environ.get(name, "")
    if not text:
        return otherwise
    if not text.isdigit():
        raise ConfigError(f"environment variable {name} is {text!r}, must be a number as torchrun sets it")
    return int(text)
