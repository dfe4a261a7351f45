"""Mixtures of experts of transformers: their gates swapped for ReLU gates, under a model type of their own."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from remoe.data import load_tokenizer
from remoe.data.tokenizer import CARD
from remoe.errors import CheckpointError, ConfigError, MissingExtraError, one_of

try:
    from transformers import AutoModelForCausalLM
except ImportError:
    raise MissingExtraError("transformers", "hf") from None

from remoe.convert import modeling_relu_moe
from remoe.convert.agreement import Conversion, Logits, layer_figures, measure_agreement
from remoe.convert.modeling_relu_moe import FAMILIES, topk_gates
from remoe.convert.relu_gate import ReLUGate, TopKTokens
from remoe.convert.swap import Gates, StandIns
from remoe.convert.text import ConversionText
from remoe.export import write_tokenizer

_CODE = Path(modeling_relu_moe.__file__).stem
TOKENIZER_FILES = (CARD, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
                   "vocab.json", "merges.txt", "chat_template.jinja")  # fmt: skip
_FOLDED = "e_score_correction_bias"
"""A buffer of DeepSeek-V3's gate that the fit has taken in."""


def load_source(source: Path, model_class: Any = AutoModelForCausalLM) -> Any:
    """The transformers model at `source`, in eval mode and its own dtype."""
    try:
        return model_class.from_pretrained(source, dtype="auto", local_files_only=True).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"transformers cannot load {source}: {' '.join(str(error).split())}") from error


def swap_gates(source: Any, text: ConversionText) -> tuple[Any, Conversion]:
    """A model with ReLU gates, and how close it is to its source, whose tensors it shares.

    Raises ConfigError for a family that is not known.
    """
    stand_ins = StandIns(foreign_gates(source))
    with torch.no_grad(), stand_ins:
        source(text.calibration.tokens_BS, use_cache=False)
        stand_ins.restart_counts()
        for batch in text.batches:
            source(batch.tokens_BS, use_cache=False)
    converted = with_relu_gates(source, stand_ins.all_fitted)
    agreement = measure_agreement(_logits(source), _logits(converted), text.batches)
    return converted, Conversion(
        source=source.config.model_type,
        target=converted.config.model_type,
        agreement=agreement,
        top_k=converted.config.target_experts_per_tok,
        **layer_figures(stand_ins.counts),
    )


def foreign_gates(model: Any) -> Gates:
    """The gates of a model of one of FAMILIES: (logits, weights_TK, index_TK) from hidden states."""
    if model.config.model_type not in FAMILIES:
        raise ConfigError(
            f"the source is a {model.config.model_type!r}, {one_of(model.config.model_type, [*FAMILIES])}"
        )

    def read(hidden_TH: Tensor, output: tuple[Tensor, Tensor, Tensor]) -> TopKTokens:
        logits_TE, weights_TK, index_TK = output
        weights_TE = torch.zeros_like(logits_TE, dtype=torch.float32).scatter(1, index_TK, weights_TK.float())
        routing_map_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, index_TK, True)
        return TopKTokens(hidden_TH.float(), weights_TE, routing_map_TE)

    def write(output: tuple[Tensor, Tensor, Tensor], weights_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index_TE = torch.arange(weights_TE.shape[1], device=weights_TE.device).expand_as(weights_TE)
        return output[0], weights_TE.to(output[1].dtype), index_TE

    return Gates(topk_gates(model), read, write)


def with_relu_gates(source: Any, fitted: list[ReLUGate]) -> Any:
    """A model of our class for the source's family, around the source's tensors and the fitted gates.

    Every tensor of the source has its place and every place its tensor: CheckpointError where one is left over.
    """
    prefix = FAMILIES[source.config.model_type]
    config_class = getattr(modeling_relu_moe, f"ReLU{prefix}Config")
    model_class = getattr(modeling_relu_moe, f"ReLU{prefix}ForCausalLM")
    config = config_class(**_settings(source))
    config._attn_implementation = source.config._attn_implementation
    with torch.device("meta"):
        converted = model_class(config)
    state = source.state_dict(keep_vars=True)
    names = {id(module): name for name, module in source.named_modules()}
    for gate, relu in zip(topk_gates(source), fitted, strict=True):
        name = names[id(gate)]
        state.pop(f"{name}.{_FOLDED}", None)
        for key, tensor in relu._asdict().items():
            state[f"{name}.{key}"] = torch.nn.Parameter(tensor.to(gate.weight.dtype))
    unread, missing = state.keys() - converted.state_dict().keys(), converted.state_dict().keys() - state.keys()
    if unread or missing:
        raise CheckpointError(f"tensors do not fit: unread {sorted(unread)}, missing {sorted(missing)}")
    converted.load_state_dict(state, assign=True)
    converted.tie_weights()
    _copy_buffers(source, converted)
    return converted.eval()


def _settings(source: Any) -> dict[str, Any]:
    """The source's config with as many columns as experts, and the k it had as the controller's target."""
    values = source.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version", "dtype"):
        values.pop(key, None)
    prefix = FAMILIES[source.config.model_type]
    num_experts = topk_gates(source)[0].weight.shape[0]
    classes = {"AutoConfig": f"{_CODE}.ReLU{prefix}Config", "AutoModelForCausalLM": f"{_CODE}.ReLU{prefix}ForCausalLM"}
    target = {"num_experts_per_tok": num_experts, "target_experts_per_tok": source.config.num_experts_per_tok}
    return values | target | {"auto_map": classes, "output_router_logits": False}


def _copy_buffers(source: Any, converted: Any) -> None:
    """What is not saved, rotary frequencies say, has no values in a model that was built on the meta device."""
    modules = dict(source.named_modules())
    for name, module in converted.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = modules[name]._buffers[key].clone()
        if hasattr(module, "original_inv_freq") and name in modules:
            module.original_inv_freq = modules[name].original_inv_freq


def save_converted(converted: Any, source: Path, to: Path, tokenizer: str | None = None) -> None:
    """Write the model with its code and the source's tokenizer files; where it has none, those of `tokenizer`."""
    converted.save_pretrained(to)
    beside = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in beside:
        shutil.copyfile(source / name, to / name)
    if tokenizer is not None and not beside:
        write_tokenizer(load_tokenizer(tokenizer), to, None)


def _logits(model: Any) -> Logits:
    return lambda tokens_BS: model(tokens_BS, use_cache=False).logits
