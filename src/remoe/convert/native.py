"""Our own model from and to those of transformers that are the same function: Mixtral and Llama."""

from typing import Any

import torch
from torch import Tensor

from remoe.errors import CheckpointError, ConfigError, MissingExtraError
from remoe.model import ReMoEConfig, ReMoEForCausalLM

MODEL_TYPES = ("mixtral", "llama")
_THEIR_GATE, _OUR_GATE = ".mlp.gate.weight", ".mlp.router.weight"
_TIED = "lm_head.weight"


def missing_in_native(config: Any) -> str | None:
    """What a config of transformers has that our block has not, as a reason; None where it is the same function."""
    if config.model_type not in MODEL_TYPES:
        return f"model type {config.model_type}"
    plain = {"sliding_window": None, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    other = [key for key, value in plain.items() if (getattr(config, key, value) or value) != value]
    if other:
        return f"{other[0]} {getattr(config, other[0])}"
    rope = config.rope_parameters.get("rope_type", "default")
    return None if rope == "default" else f"rope_type {rope}"


def from_transformers(model: Any) -> ReMoEForCausalLM:
    """Our model with a Mixtral's or Llama's tensors, shared and not copied: the same function.

    Raises ConfigError for a setting that our block has not, CheckpointError for a tensor without a place.
    """
    reason = missing_in_native(model.config)
    if reason is not None:
        raise ConfigError(f"the source has {reason}, which the native model has not")
    state = {name.replace(_THEIR_GATE, _OUR_GATE): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    config = _native_config(model.config)
    if config.tie_embeddings:
        state.pop(_TIED, None)
    return filled(config, state)


def _native_config(config: Any) -> ReMoEConfig:
    routed: dict[str, Any] = {"moe_layers": "none"}
    if config.model_type == "mixtral":
        router = {"name": "topk", "renormalize": True}
        routed = {"num_experts": config.num_local_experts, "top_k": config.num_experts_per_tok, "router": router}
    return ReMoEConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        intermediate_size=config.intermediate_size,
        tie_embeddings=config.tie_word_embeddings,
        rope_theta=config.rope_parameters["rope_theta"],
        norm_eps=config.rms_norm_eps,
        init_std=config.initializer_range,
        **routed,
    )


def missing_in_top_k(config: ReMoEConfig) -> str | None:
    """Why a native model is no Mixtral and no Llama, as a reason; None where it is one exactly."""
    if config.is_post_norm:
        return "block post_norm"
    if config.num_moe_layers == 0:
        return None
    if config.num_moe_layers < config.num_layers:
        return "dense layers beside MoE layers"
    options = {"renormalize": False, "bias": False, "warmup_steps": 0} | config.moe.router_options
    if config.moe.router_name == "relu":
        return "router relu: it uses as many experts as a token opens, no Top-K gate gives the same weights"
    if config.moe.router_name != "topk":
        return f"router {config.moe.router_name}"
    if options["bias"] or options["warmup_steps"]:
        return "a Top-K router with a bias or a warm-up"
    if not options["renormalize"]:
        return "gates that are not divided by their sum (router.renormalize false)"
    return None


def to_transformers(model: ReMoEForCausalLM) -> Any:
    """A Mixtral or Llama with our model's tensors, shared, not copied; ConfigError where none is the same function."""
    config = model.config
    reason = missing_in_top_k(config)
    if reason is not None:
        raise ConfigError(f"the model has {reason}; exact are only renormalised Top-K (Mixtral) and dense (Llama)")
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "hf") from None
    shared: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.moe.expert_size if config.num_moe_layers else config.intermediate_size,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if config.num_moe_layers:
        shared |= {"num_local_experts": config.moe.routed_experts, "num_experts_per_tok": config.moe.routed_top_k}
        other = transformers.MixtralForCausalLM(transformers.MixtralConfig(**shared))
    else:
        other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared))
    state = {name.replace(_OUR_GATE, _THEIR_GATE): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    if config.tie_embeddings:
        state[_TIED] = state["model.embed_tokens.weight"]
    check_names(state.keys(), other.state_dict().keys())
    other.load_state_dict(state, assign=True)
    other.tie_weights()
    return other.eval()


def filled(config: ReMoEConfig, state: dict[str, Tensor]) -> ReMoEForCausalLM:
    """A native model in eval mode around these tensors; CheckpointError where they are not exactly its own."""
    with torch.device("meta"):
        model = ReMoEForCausalLM(config)
    check_names(state.keys(), model.state_dict().keys())
    model.load_state_dict(state, assign=True)
    return model.eval()


def check_names(given: Any, wanted: Any) -> None:
    """Raise CheckpointError unless both sets of names are the same."""
    unread, missing = sorted(given - wanted), sorted(wanted - given)
    if unread or missing:
        raise CheckpointError(f"tensors do not fit: unread {unread}, missing {missing}")
