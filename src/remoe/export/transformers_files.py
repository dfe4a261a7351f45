"""What of an export transformers reads: more settings in config.json, the remote code that they name, generation."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from remoe.data.files import write_whole
from remoe.data.tokenizer import Tokenizer
from remoe.model import ReMoEConfig, ReMoEForCausalLM
from remoe.training.metrics import Metrics, last_value
from remoe.training.run import Run

REMOTE_CODE = "modeling_remoe.py"
AUTO_MAP = {
    "AutoConfig": "modeling_remoe.ReMoEConfig",
    "AutoModel": "modeling_remoe.ReMoEModel",
    "AutoModelForCausalLM": "modeling_remoe.ReMoEForCausalLM",
}
ROUTERS = ("relu", "topk", "rmoe", "recurrent_relu")
_CONFIG, _GENERATION = "config.json", "generation_config.json"
_OF_TRAINING = ("max_position_embeddings", "sparsity_coef", "load_balanced", "router_aux_loss_coef")


def missing_in_transformers(config: ReMoEConfig) -> str | None:
    """Why a model has no class in transformers: what is set and what is allowed there; None where it has one."""
    if config.is_post_norm:
        return "model.block is 'post_norm', must be 'pre_norm' to load in transformers"
    if not config.num_moe_layers:
        return None
    if config.moe.router_name not in ROUTERS:
        return f"router is {config.moe.router_name!r}, must be one of {', '.join(ROUTERS)} to load in transformers"
    if config.moe.router_options.get("passing") == "shuffle":
        return "router.passing is 'shuffle', an experiment of training, must be another to load in transformers"
    return None


def write(model: ReMoEForCausalLM, tokenizer: Tokenizer, folder: Path, of_training: dict[str, Any]) -> None:
    """Complete a folder that holds config.json and the weights, by settings of its training too.

    Needs no transformers.
    """
    path = folder / _CONFIG
    described = json.loads(path.read_text(encoding="utf-8")) | _settings(model, tokenizer) | of_training
    write_whole(path, _json(described))
    write_whole(folder / _GENERATION, _json(_token_ids(tokenizer)))
    write_whole(folder / REMOTE_CODE, files("remoe").joinpath("hf", REMOTE_CODE).read_bytes())


def remove(folder: Path) -> None:
    """Take away what an earlier export into the same folder left for transformers."""
    for name in (REMOTE_CODE, _GENERATION):
        (folder / name).unlink(missing_ok=True)


def run_settings(run: Run, metrics: list[Metrics]) -> dict[str, Any]:
    """What transformers' class is told of a run: the length of its sequences, and the weights of auxiliary terms."""
    config, coef = run.config, last_value(metrics, "sparsity_coef", 0.0)
    if config.sparsity.mode == "released":  # there the term is a sum over layers
        coef *= config.model.num_moe_layers
    return {
        "max_position_embeddings": config.data.sequence_length,
        "sparsity_coef": coef,
        "load_balanced": config.sparsity.load_balanced,
        "router_aux_loss_coef": config.losses.load_balancing_coef,
    }


def kept_settings(source: Path | None) -> dict[str, Any]:
    """The same of an export that a model was made from, as far as it has them."""
    path = None if source is None else source / _CONFIG
    values = {} if path is None or not path.is_file() else json.loads(path.read_text(encoding="utf-8"))
    return {key: values[key] for key in _OF_TRAINING if key in values}


def _settings(model: ReMoEForCausalLM, tokenizer: Tokenizer) -> dict[str, Any]:
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {"auto_map": AUTO_MAP, "dtype": dtype} | _token_ids(tokenizer)


def _token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"bos_token_id": None, "eos_token_id": tokenizer.eod, "pad_token_id": tokenizer.eod}


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
