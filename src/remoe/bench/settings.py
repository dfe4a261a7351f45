"""What the commands' words mean."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from remoe.data import load_tokenizer
from remoe.errors import ConfigError, one_of
from remoe.training.config import TrainConfig

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_named(name: str, device: torch.device) -> torch.dtype:
    """The type of this name; without one bf16 on a GPU and fp32 on a CPU, whose bf16 products are slow."""
    if not name:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise ConfigError(f"--dtype is {name!r}, {one_of(name, list(_DTYPES))}")
    return _DTYPES[name]


def chosen(option: str, names: Sequence[str], known: Mapping[str, object], or_none: bool = True) -> list[str]:
    """Names out of those known; `all` stands for every one, and `none` for none where that is allowed."""
    words = ["all", "none"] if or_none else ["all"]
    if len(names) == 1 and names[0] in words:
        return list(known) if names[0] == "all" else []
    for name in names or ([] if or_none else [""]):
        if name not in known:
            raise ConfigError(f"{option} has {name!r}, {one_of(name, [*known, *words])}")
    return list(names)


def resolved(config: TrainConfig) -> TrainConfig:
    """The run with its vocabulary: the config's, else the tokenizer's."""
    if config.model.vocab_size is not None:
        return config
    vocab_size = load_tokenizer(config.data.tokenizer).vocab_size
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))


def whole_numbers(option: str, words: Sequence[str]) -> tuple[int, ...]:
    """Whole numbers above 0."""
    if not words or not all(word.isdecimal() and int(word) for word in words):
        raise ConfigError(f"{option} is {','.join(words)!r}, must be whole numbers joined by commas, e.g. 1,64")
    return tuple(int(word) for word in words)


def sizes_of(text: str) -> tuple[int, int]:
    """Sequences and tokens, as in 16x1024."""
    first, cross, second = text.partition("x")
    if not (cross and first.isdecimal() and second.isdecimal() and int(first) and int(second)):
        raise ConfigError(f"--prompt is {text!r}, must be SEQUENCESxTOKENS, e.g. 16x1024")
    return int(first), int(second)
