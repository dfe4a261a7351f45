"""What a config leaves open until the run's machine and text are known."""

import dataclasses

import torch

from remoe.data.tokenizer import Tokenizer, check_vocabulary
from remoe.distributed.config import ParallelConfig, check_model, own_micro_batch, resolve_parallel
from remoe.errors import ConfigError
from remoe.training.config import TrainConfig


def pick_device(name: str, key: str = "train.device") -> torch.device:
    """The device that a setting names; auto is the GPU where there is one. ConfigError, naming `key`, for none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{key} is {name!r}, must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{key} is {name!r}, but torch sees {torch.cuda.device_count()} GPUs here; use auto or cpu")
    return device


def resolve_ranks(config: TrainConfig, world_size: int) -> ParallelConfig:
    """The `parallel` section filled in for so many processes. ConfigError where run and processes do not fit."""
    parallel = resolve_parallel(config.parallel, world_size)
    loop = config.train
    check_model(parallel, config.model, config.data.sequence_length)
    own_micro_batch(parallel.data_ranks, loop.batch_size, loop.micro_batch_size, parallel.pipeline)
    if world_size > 1 and loop.cuda_graphs:
        raise ConfigError("train.cuda_graphs is true, must be false with more than one process for now")
    return parallel


def resolve(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """The config with the vocabulary's size filled in. ConfigError where the model's is too small for the tokenizer."""
    check_vocabulary(tokenizer, config.model.vocab_size, fix="set it to null")
    if config.model.vocab_size is None:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))
    return config
