"""From our own model to transformers' class and back: the same tensors under the same names."""

from dataclasses import fields
from typing import cast

import torch

from remoe import model as native
from remoe.config import from_dict, to_dict
from remoe.errors import ConfigError
from remoe.hf.modeling_remoe import ReMoEConfig, ReMoEForCausalLM


def config_from_native(config: native.ReMoEConfig) -> ReMoEConfig:
    """The config of transformers' class; ConfigError for a router or block that it does not have."""
    try:
        return ReMoEConfig(**to_dict(config))
    except ValueError as error:
        raise ConfigError(f"model.{error}") from None


def config_to_native(config: ReMoEConfig) -> native.ReMoEConfig:
    """The native config; settings that only transformers has are left behind."""
    values = config.to_dict()
    names = [field.name for field in fields(native.ReMoEConfig)]
    return from_dict(native.ReMoEConfig, {name: values[name] for name in names if name in values})


def from_native(model: native.ReMoEForCausalLM) -> ReMoEForCausalLM:
    """Transformers' class around the native model's tensors, shared and not copied, in the same mode."""
    with torch.device("meta"):
        other = ReMoEForCausalLM(config_from_native(model.config))
    state = model.state_dict(keep_vars=True)
    if model.config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    other.load_state_dict(state, assign=True)
    other.tie_weights()
    return other.train(model.training)


def to_native(model: ReMoEForCausalLM) -> native.ReMoEForCausalLM:
    """The native model around the tensors of transformers' class, shared and not copied, in the same mode."""
    with torch.device("meta"):
        other = native.ReMoEForCausalLM(config_to_native(cast(ReMoEConfig, model.config)))
    state = model.state_dict(keep_vars=True)
    if model.config.tie_embeddings:
        del state["lm_head.weight"]
    other.load_state_dict(state, assign=True)
    return other.train(model.training)
