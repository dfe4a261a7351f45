"""Checkpoints of ReMoE's released code, and of other Megatron GPT models with our routers, as remoe models."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from remoe.convert.megatron.config import config_for
from remoe.convert.megatron.files import read
from remoe.convert.megatron.names import to_native
from remoe.data import load_tokenizer
from remoe.data.tokenizer import check_vocabulary
from remoe.errors import CheckpointError
from remoe.model import ReMoEForCausalLM
from remoe.model.weights import save_model


class Converted(NamedTuple):
    """A model in the dtype it was saved in, and what else its checkpoint says."""

    model: ReMoEForCausalLM
    sparsity_coef: float | None
    """In the released code's unit, a sum over layers: L times smaller than that of mode `paper`."""
    iteration: int | None


def from_megatron(folder: Path, router: str | dict[str, Any] | None = None) -> Converted:
    """Read a checkpoint in Megatron's torch_dist or torch format, of any number of ranks; nothing in it is run.

    `router`: which one it was trained with; None: what the arguments of ReMoE's code say. Every tensor is used and
    every parameter filled: else, and for a model that ours is not, CheckpointError.
    """
    checkpoint = read(folder)
    config = config_for(checkpoint.tensors, checkpoint.args, router)
    weights = to_native(checkpoint.tensors, config)
    with torch.device("meta"):
        model = ReMoEForCausalLM(config)
    expected = model.state_dict()
    wrong = sorted(expected.keys() ^ weights.keys())
    if wrong:
        state = "has nothing for" if wrong[0] in expected else "has a tensor that its own arguments leave no place for:"
        raise CheckpointError(f"the checkpoint {state} {wrong[0]!r}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)}, must be {list(expected[name].shape)}"
            raise CheckpointError(f"{name!r} has shape {shapes} by the checkpoint's arguments")
    model.load_state_dict({name: tensor.contiguous() for name, tensor in weights.items()}, strict=True, assign=True)
    return Converted(model.eval(), checkpoint.sparsity_coef, checkpoint.iteration)


def convert_megatron(
    folder: Path, to: Path, tokenizer: str | None = None, router: str | dict[str, Any] | None = None
) -> Converted:
    """Write a Megatron checkpoint as a remoe model's folder, which all commands take.

    `tokenizer`: the one that its data was prepared with, such as `gpt2:FOLDER` with vocab.json and merges.txt; without
    it the model can be loaded, but neither `remoe export` nor `remoe generate` knows what its ids mean. Raises
    ConfigError for a tokenizer with more ids than the model has.
    """
    converted = from_megatron(folder, router)
    known = None if tokenizer is None else load_tokenizer(tokenizer)
    if known is not None:
        check_vocabulary(known, converted.model.config.vocab_size, fix="name the one its data was prepared with")
    save_model(converted.model, to)
    if known is not None:
        known.save(to)
    return converted
