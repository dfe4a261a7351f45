"""What a resumed run may change, and the random state that it goes on with."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from remoe.config import to_dict
from remoe.errors import ConfigError
from remoe.training.checkpoint import Checkpoint
from remoe.training.config import TrainConfig

CHANGEABLE = {
    "name", "data.cache", "data.tokenizer",
    "train.steps", "train.micro_batch_size", "train.device", "train.compile", "train.activation_checkpointing",
    "train.rows", "train.cuda_graphs", "train.deterministic",
    "train.log_interval", "train.validation_interval", "train.checkpoint_interval", "train.keep_checkpoints",
    "train.async_checkpoint",
    "train.flip_interval", "train.max_bad_steps", "train.sinks",
}  # fmt: skip
"""Settings that a resumed run may change: length, speed, place and logging, not model, data or optimizer.

The tokenizer's place may change, itself not: check_corpus compares fingerprints.
"""


def check_resume(config: TrainConfig, checkpoint: Checkpoint) -> None:
    """Raise ConfigError, naming key and both values, where the config does not go on with the checkpoint's."""
    defaults = _flat(to_dict(TrainConfig()))  # what a checkpoint from before a key existed was trained with
    saved, wanted = defaults | _flat(checkpoint.record["config"]), _flat(to_dict(config))
    for key in sorted(saved.keys() | wanted.keys()):
        if key.startswith("parallel.") or key in CHANGEABLE or saved.get(key) == wanted.get(key):
            continue
        if key == "model.vocab_size" and wanted.get(key) is None:
            continue  # the tokenizer decides, and it is the same
        raise ConfigError(
            f"{key} is {wanted.get(key)!r}, but {checkpoint.path} was trained with {saved.get(key)!r}; "
            "set it back, or use another name (or --overwrite) for a new run"
        )
    if config.train.steps < checkpoint.step:
        raise ConfigError(
            f"train.steps is {config.train.steps}, must be at least {checkpoint.step}: so far is {checkpoint.path}"
        )


def check_corpus(manifest: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raise ConfigError where the text is not the one that the checkpoint was trained on, though its path is."""
    saved = checkpoint.record["corpus"]
    for key in ("tokenizer", "train", "validation"):
        if manifest[key] != saved[key]:
            raise ConfigError(
                f"data.{key} is now {_brief(manifest[key])}, but {checkpoint.path} was trained with "
                f"{_brief(saved[key])}; bring the text back, or use another name (or --overwrite) for a new run"
            )


def _brief(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's global generators that a run may draw from: the CPU's and its device's."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put those states back."""
    torch.set_rng_state(states["random.cpu"])
    if "random.cuda" in states:
        torch.cuda.set_rng_state(states["random.cuda"], device)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return dict(_items(values, prefix))


def _items(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and prefix == "":
            yield from _items(value, f"{key}.")
        else:
            yield f"{prefix}{key}", value
