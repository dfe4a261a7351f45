"""A checkpoint converted: to ReLU routing, or back to Top-K where that is exact."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from remoe.config import check_choice
from remoe.convert.agreement import Conversion, measure_agreement
from remoe.convert.model_type import model_type_of
from remoe.convert.native import from_transformers, missing_in_native, to_transformers
from remoe.convert.own import Upcycling, native_logits, swap_native_gates, upcycle
from remoe.convert.text import ConversionText, TextSizes, read_text, tokenizer_for
from remoe.data import load_tokenizer
from remoe.data.tokenizer import CARD
from remoe.errors import ConfigError
from remoe.eval.held_out import text_beside
from remoe.export import write_export, write_tokenizer
from remoe.model import ReMoEForCausalLM
from remoe.training.loading import load
from remoe.training.saved import run_of, template_of, tokenizer_folder, tokenizer_of

REPORT = "conversion.json"
_OURS = "remoe"


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What to make of a checkpoint. `router`: relu, or topk (back, where it is exact).

    `data` is text that fits and compares gates; null: the validation text of the source's run. `upcycling` says what
    dense layers become.
    """

    router: str = "relu"
    data: str | None = None
    tokenizer: str | None = None
    sequence_length: int | None = None
    sizes: TextSizes = field(default_factory=TextSizes)
    upcycling: Upcycling = field(default_factory=Upcycling)


def convert(source: Path, to: Path, config: ConvertConfig) -> Conversion:
    """Write a converted model into the folder `to`, with conversion.json, and say how close it is to its source.

    The source is a run, checkpoint or export of ours, or a folder of transformers. Mixtral and Llama without settings
    that our block lacks become our own model; other mixtures of experts stay models of transformers, with a model type
    of their own. Raises ConfigError, CheckpointError or DataError before anything is written.
    """
    check_choice("--router", config.router, ("relu", "topk"))
    is_ours = run_of(source) is not None or model_type_of(source) in (None, _OURS)
    model: Any = load(source) if is_ours else _foreign().load_source(source)
    if config.router == "topk":
        result = _to_topk(model, source, to, config.tokenizer)
    elif not is_ours and missing_in_native(model.config) is not None:
        converted, result = _foreign().swap_gates(model, _text(source, config, model.config.vocab_size))
        _foreign().save_converted(converted, source, to, config.tokenizer)
    else:
        own = model if is_ours else from_transformers(model)
        converted, result = _native(own, source, config)
        tokenizer = load_tokenizer(tokenizer_for(source, config.tokenizer))
        write_export(converted, tokenizer, to, run_of(source), source=source, is_changed=True)
        result = result if is_ours else replace(result, source=model.config.model_type)
    (to / REPORT).write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    return result


def _foreign() -> ModuleType:
    from remoe.convert import foreign  # needs transformers, an extra that our own checkpoints do without

    return foreign


def _native(own: ReMoEForCausalLM, source: Path, config: ConvertConfig) -> tuple[ReMoEForCausalLM, Conversion]:
    vocab_size = own.config.vocab_size
    assert vocab_size is not None, "a model that exists knows its vocabulary"
    tokenizer_for(source, config.tokenizer)  # told before the work, not after it
    if own.config.num_moe_layers:
        return swap_native_gates(own, _text(source, config, vocab_size))
    converted = upcycle(own, config.upcycling)
    agreement = None
    if config.data is not None:
        batches = _text(source, config, vocab_size).batches
        agreement = measure_agreement(native_logits(own), native_logits(converted), batches)
    moe = converted.config.moe
    return converted, Conversion(source="native", target="native", agreement=agreement, top_k=moe.routed_top_k)


def _to_topk(model: Any, source: Path, to: Path, tokenizer: str | None) -> Conversion:
    if not isinstance(model, ReMoEForCausalLM):
        raise ConfigError(f"{source} is a {model.config.model_type}, must be a native model to become Top-K again")
    other = to_transformers(model)
    given = load_tokenizer(tokenizer) if tokenizer is not None else None
    known = tokenizer_of(source) if given is None and (tokenizer_folder(source) / CARD).is_file() else given
    other.save_pretrained(to)
    if known is not None:
        write_tokenizer(known, to, template_of(source))
    return Conversion(source="native", target=other.config.model_type, agreement=None)


def _text(source: Path, config: ConvertConfig, vocab_size: int) -> ConversionText:
    run = run_of(source)
    if config.data is not None:
        tokenizer = tokenizer_for(source, config.tokenizer)
        data = text_beside(source, config.data, config.sequence_length, tokenizer)
    elif run is not None:
        data = run.config.data
    else:
        raise ConfigError(f"{source} knows no text; give one to fit gates on with --data")
    return read_text(data, config.sizes, vocab_size)
