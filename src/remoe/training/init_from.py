"""A run that starts from another one's weights: `train.init_from`."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from remoe.config import to_dict
from remoe.data import DataConfig, Tokenizer
from remoe.errors import ConfigError
from remoe.model import ReMoEConfig, ReMoEForCausalLM
from remoe.model.weights import read_config
from remoe.moe import SparsityController
from remoe.training.config import TrainConfig
from remoe.training.loading import config_of, find_checkpoint, is_export, load
from remoe.training.run import CONFIG, TOKENIZER, Run
from remoe.training.saved import run_of, tokenizer_of


class Origin(NamedTuple):
    """What a run takes over besides the weights."""

    model: ReMoEConfig
    tokenizer: str
    """The folder that holds it."""


def with_origin(config: TrainConfig, own_path: Path | None) -> TrainConfig:
    """The config with model and tokenizer of `train.init_from`, where they were left at their defaults.

    `own_path`: the run that is resumed, which knows both although init_from may be gone. Raises ConfigError where the
    config asks for another model, CheckpointError where there is nothing to start from.
    """
    start = config.train.init_from
    if start is None:
        return config
    has_begun = own_path is not None and (own_path / CONFIG).is_file()
    origin = _origin_of_run(Run.open(own_path)) if own_path is not None and has_begun else origin_of(start)
    asked = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or origin.model.vocab_size)
    if config.model != ReMoEConfig() and asked != origin.model:
        key, wanted, found = _first_difference(asked, origin.model)
        raise ConfigError(
            f"model.{key} is {wanted!r}, but train.init_from {start} has {found!r}; leave out the model section, which "
            "is taken from there"
        )
    data = config.data
    if data.tokenizer == DataConfig().tokenizer:
        data = dataclasses.replace(data, tokenizer=origin.tokenizer)
    return dataclasses.replace(config, model=origin.model, data=data)


def origin_of(start: Path) -> Origin:
    """Model and tokenizer of a run, a checkpoint or an export."""
    if is_export(start):
        return Origin(read_config(start), str(start))
    run = run_of(start)
    return Origin(config_of(find_checkpoint(start)).model, str((run.path if run else start) / TOKENIZER))


def check_tokenizer(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raise ConfigError where the text's tokenizer is not the one that the weights know."""
    start = config.train.init_from
    if start is None or not start.exists():
        return
    origin = tokenizer_of(start)
    if origin.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"data.tokenizer is {tokenizer.name}, but train.init_from {start} was trained with {origin.name}; leave it "
            "out, or name that one's folder"
        )


def initial_model(config: TrainConfig, will_be_restored: bool = False) -> ReMoEForCausalLM:
    """The model before its first step, in fp32: drawn from the seed, or the weights of `train.init_from`.

    `will_be_restored`: a checkpoint of the run itself comes next, so the origin is not needed any more.
    """
    if config.train.init_from is None or will_be_restored:
        return ReMoEForCausalLM(config.model, seed=config.seed)
    return load(config.train.init_from).float().train()


def take_over_coefficient(config: TrainConfig, controller: SparsityController | None) -> None:
    """Go on with the sparsity coefficient that held the origin's density; an export has none, and its own starts.

    A coefficient a layer is not made of one for all, nor the other way round.
    """
    start = config.train.init_from
    if controller is None or start is None or is_export(start):
        return
    found = find_checkpoint(start)
    if config_of(found).sparsity.per_layer == config.sparsity.per_layer:
        found.load({"sparsity.log_coef": controller.log_coef})


def _origin_of_run(run: Run) -> Origin:
    return Origin(run.config.model, str(run.path / TOKENIZER))


def _first_difference(wanted: ReMoEConfig, found: ReMoEConfig) -> tuple[str, Any, Any]:
    asked, there, default = to_dict(wanted), to_dict(found), to_dict(ReMoEConfig())
    keys = [key for key in asked if asked[key] != there[key]]
    key = next((key for key in keys if asked[key] != default[key]), keys[0])
    return key, asked[key], there[key]
