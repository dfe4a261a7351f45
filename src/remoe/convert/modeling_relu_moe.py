"""Mixtures of experts of transformers with ReLU routing, in one file: a converted checkpoint carries it.

Hence nothing but torch and transformers is imported here. `ReLUOlmoeForCausalLM` is OlmoeForCausalLM but for its gates,
and so on for each of FAMILIES; a class is made when it is first asked for. They have a `model_type` of their own
(relu_olmoe): under the source's, transformers would silently route by Top-K again.

Shapes: T tokens, H hidden, E experts, L MoE layers.
"""

import importlib
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

FAMILIES = {
    "mixtral": "Mixtral",
    "olmoe": "Olmoe",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "granitemoe": "GraniteMoe",
}
"""Model type of the source, and what its classes' names begin with."""

EPS = 1e-6
_Mixed: Any = object  # the class of transformers that ReLUMoE is mixed into has the rest


@dataclass
class ReLUMoEOutput(MoeCausalLMOutputWithPast):
    """What the model returns. `loss` holds all terms; `aux_loss` is the L1 term alone, weighted, for logging."""

    tokens_per_expert: Tensor | None = None
    """[L, E] int64: what the sparsity controller counts."""
    num_tokens: Tensor | None = None
    """0-dim int64: tokens that count."""


class GateOutput(NamedTuple):
    """What a gate returns, in the order of the router it stands for, with a column for each of the E experts."""

    logits_TE: Tensor
    weights_TE: Tensor
    """0 where an expert is closed."""
    index_TE: Tensor


class ReLUGate:
    """Mixed into a family's Top-K router: R = ReLU(X W^T + b), weights R / rms(R) * scale, in fp32 or wider.

    `threshold` is the density dial: logits must be above it; below 0 it is also taken off.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    scale: nn.Parameter
    threshold: float

    def forward(self, hidden_states: Tensor) -> GateOutput:
        """Route hidden_states [..., H] as T tokens."""
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(hidden_TH.device.type, enabled=False):  # rounding near the threshold flips experts
            logits_TE = F.linear(hidden_TH.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        gates_TE = open_gates(logits_TE, self.threshold)
        mean_square_T1 = gates_TE.square().mean(dim=-1, keepdim=True)
        weights_TE = gates_TE * torch.rsqrt(mean_square_T1 + EPS) * self.scale.to(dtype)
        index_TE = torch.arange(weights_TE.shape[1], device=weights_TE.device).expand_as(weights_TE)
        return GateOutput(logits_TE, weights_TE.to(hidden_states.dtype), index_TE)


def open_gates(logits_TE: Tensor, threshold: float) -> Tensor:
    """ReLU with a threshold: above 0 it cuts, below 0 it shifts."""
    return (logits_TE - min(threshold, 0.0)).masked_fill(logits_TE <= threshold, 0)


class ReLUMoEConfig(_Mixed):
    """Mixed into a family's config, whose num_experts_per_tok then counts the columns that a gate returns: all E."""

    is_relu_gated = True
    keys_to_ignore_at_inference = [  # noqa: RUF012  the Trainer adds a list to it
        "past_key_values", "router_logits", "aux_loss", "tokens_per_expert", "num_tokens",
    ]  # fmt: skip
    target_experts_per_tok = 1
    """The k that the source had, and training steers to."""
    thresholds: Any = 0.0
    """The density dial: one number, or one for each MoE layer."""
    sparsity_coef: Any = 0.0
    """Times the L1 term in `loss`, the mean over layers; remoe.hf.SparsityCallback adapts it."""

    @property
    def routed_top_k(self) -> int:
        """As in remoe's own config."""
        return self.target_experts_per_tok

    @property
    def routed_experts(self) -> int:
        """As in remoe's own config."""
        return self.num_experts_per_tok


class ReLUMoE(_Mixed):
    """Mixed into a family's causal language model: its gates become ReLU gates, and its loss gets their L1 term."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.gates = [to_relu_gate(gate) for gate in topk_gates(self)]
        self.set_thresholds(config.thresholds)
        self.sparsity_coef: float | Tensor = config.sparsity_coef
        """What `loss` multiplies the L1 term by: a number, 0-dim, or [L] with one a layer."""

    def set_thresholds(self, thresholds: float | list[float]) -> None:
        """Turn the density dial: one number, or one for each MoE layer. It is saved with the model."""
        each = thresholds if isinstance(thresholds, list) else [thresholds] * len(self.gates)
        if not all(isinstance(threshold, int | float) and math.isfinite(threshold) for threshold in each):
            raise ValueError(f"thresholds is {thresholds!r}, must be finite numbers")
        if len(each) != len(self.gates):
            raise ValueError(f"thresholds has {len(each)} numbers, must be one, or one for each of {len(self.gates)}")
        self.config.thresholds = thresholds
        for gate, threshold in zip(self.gates, each, strict=True):
            gate.threshold = float(threshold)

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        **kwargs: Any,
    ) -> ReLUMoEOutput:  # fmt: skip
        """As the family's; with labels the loss is cross-entropy plus sparsity_coef times the mean L1 term."""
        kwargs["output_router_logits"] = False  # its load-balancing loss is for a softmax
        with _recorded(self.gates) as logits_L:
            outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        mask_T = _token_mask(attention_mask, logits_L[0])
        pairs = [self._counted(gate, logits_TE, mask_T) for gate, logits_TE in zip(self.gates, logits_L, strict=True)]
        l1_L, tokens_per_expert_LE = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        aux_loss = (self.sparsity_coef * l1_L).mean()
        loss = outputs.loss
        if loss is not None and labels is not None:
            loss = loss + _share(labels, **kwargs) * aux_loss.to(loss.device)
        values = {key: value for key, value in outputs.items() if key not in ("loss", "aux_loss", "router_logits")}
        num_tokens = mask_T.sum()
        return ReLUMoEOutput(
            loss=loss, aux_loss=aux_loss, tokens_per_expert=tokens_per_expert_LE, num_tokens=num_tokens, **values
        )

    def _counted(self, gate: Any, logits_TE: Tensor, mask_T: Tensor) -> tuple[Tensor, Tensor]:
        """The un-weighted load-balanced L1 term, (1/T) sum of f_e R_te (ReMoE eq. 10), and the tokens per expert."""
        gates_TE = open_gates(logits_TE, gate.threshold).masked_fill(~mask_T[:, None], 0)
        num_tokens = mask_T.sum().clamp(min=1)
        tokens_per_expert_E = (gates_TE > 0).sum(0)
        load_E = tokens_per_expert_E / num_tokens * (gates_TE.shape[1] / self.config.target_experts_per_tok)
        return (load_E * gates_TE.sum(0)).sum() / num_tokens, tokens_per_expert_E

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with this file beside the weights."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        target = Path(save_directory) / Path(__file__).name
        if target.resolve() != Path(__file__).resolve():
            shutil.copyfile(__file__, target)
        return saved

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """By default remoe's kernels where `remoe.hf` was imported: they skip closed experts."""
        own = "remoe" if "remoe" in ALL_EXPERTS_FUNCTIONS else None
        return super().get_correct_experts_implementation(requested_experts or own)


def topk_gates(model: nn.Module) -> list[Any]:
    """The Top-K routers of a model of one of FAMILIES, in the order of its layers."""
    return [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]


def to_relu_gate(gate: Any) -> Any:
    """Make a Top-K router a ReLU gate in place: its class becomes a subclass, so that what looks for it finds it."""
    num_experts = gate.weight.shape[0]
    gate.bias = nn.Parameter(torch.zeros(num_experts, dtype=gate.weight.dtype))
    gate.scale = nn.Parameter(torch.ones(num_experts, dtype=gate.weight.dtype))
    gate._buffers.pop("e_score_correction_bias", None)
    gate.threshold = 0.0
    gate.__class__ = type(f"ReLU{type(gate).__name__}", (ReLUGate, type(gate)), {})
    return gate


@contextmanager
def _recorded(gates: list[Any]) -> Iterator[list[Tensor]]:
    """The logits of each gate that is called inside, in that order."""
    logits: list[Tensor] = []
    hooks = [gate.register_forward_hook(lambda module, inputs, output: logits.append(output[0])) for gate in gates]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()


def _token_mask(attention_mask: Tensor | None, logits_TE: Tensor) -> Tensor:
    """Bool [T]: which of the new tokens count."""
    num_tokens = logits_TE.shape[0]
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.ones(num_tokens, dtype=torch.bool, device=logits_TE.device)
    return attention_mask[:, -(num_tokens // len(attention_mask)) :].flatten().bool().to(logits_TE.device)


def _share(labels: Tensor, num_items_in_batch: Tensor | int | None = None, **kwargs: Any) -> Tensor | float:
    """This micro-batch's part of the step, so that the auxiliary term is a mean over it as cross-entropy is."""
    return 1.0 if num_items_in_batch is None else (labels[..., 1:] != -100).sum() / num_items_in_batch


def _family(class_name: str) -> tuple[str, str]:
    """(model type, class name) of the source of one of our classes."""
    for model_type, prefix in FAMILIES.items():
        if class_name in (f"ReLU{prefix}Config", f"ReLU{prefix}ForCausalLM"):
            return model_type, class_name.removeprefix("ReLU")
    raise AttributeError(f"module {__name__!r} has no attribute {class_name!r}")


def __getattr__(name: str) -> Any:
    model_type, source_name = _family(name)
    package = f"transformers.models.{model_type}"
    if name.endswith("Config"):
        source = getattr(importlib.import_module(f"{package}.configuration_{model_type}"), source_name)
        made = type(name, (ReLUMoEConfig, source), {"__module__": __name__, "model_type": f"relu_{model_type}"})
    else:
        source = getattr(importlib.import_module(f"{package}.modeling_{model_type}"), source_name)
        config_class = globals().get(name.replace("ForCausalLM", "Config")) or __getattr__(
            name.replace("ForCausalLM", "Config")
        )
        made = type(name, (ReLUMoE, source), {"__module__": __name__, "config_class": config_class})
    globals()[name] = made
    return made
