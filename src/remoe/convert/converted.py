"""A converted model of transformers, called as one of ours is: so what scores ours scores it."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import remoe.hf  # noqa: F401  registers our kernels, which skip closed experts
from remoe.convert import modeling_relu_moe
from remoe.convert.foreign import load_source, save_converted
from remoe.convert.model_type import OWN_TYPE, model_type_of
from remoe.convert.modeling_relu_moe import FAMILIES
from remoe.errors import CheckpointError, ConfigError, one_of
from remoe.kernels.linear_cross_entropy import NO_LABEL
from remoe.model.causal_lm import LossOutput, ModelOutput
from remoe.moe import dial
from remoe.moe.routing import Routing


def load_converted(path: Path) -> "ConvertedModel":
    """The model in the folder, in eval mode and its own dtype. It is of our class: code in the folder never runs."""
    model_type = str(model_type_of(path))
    family = model_type.removeprefix(OWN_TYPE)
    if family not in FAMILIES:
        known = [OWN_TYPE + known for known in FAMILIES]
        raise CheckpointError(f"the model type in {path} is {model_type!r}, {one_of(model_type, known)}")
    return ConvertedModel(load_source(path, getattr(modeling_relu_moe, f"ReLU{FAMILIES[family]}ForCausalLM")))


def save_with_thresholds(path: Path, thresholds: list[float], to: Path) -> None:
    """Write the model of one folder into another, with the dial turned and its tokenizer beside it."""
    model = load_converted(path)
    model.set_thresholds(thresholds)
    save_converted(model.inner, path, to)


class ConvertedModel(nn.Module):
    """Takes and returns what `ReMoEForCausalLM` does; `config` and `inner` are those of transformers."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.config = inner.config

    def forward(
        self, tokens_BS: Tensor, token_mask_BS: Tensor | None = None, *, document_BS: Tensor | None = None,
        labels_BS: Tensor | None = None, reduction: str = "sum",
    ) -> ModelOutput | LossOutput:  # fmt: skip
        """Logits, or with labels the cross-entropies in fp32 or wider; one Routing a MoE layer, none of dense layers.

        Raises ConfigError where attention shall stay inside documents.
        """
        if document_BS is not None:
            raise ConfigError("data.document_mask is true, must be false for a model of transformers")
        with dial.recorded(self) as outputs:
            logits_BSV = self.inner(tokens_BS, attention_mask=token_mask_BS, use_cache=False).logits
        mask_T = None if token_mask_BS is None else token_mask_BS.flatten()
        gates = zip(outputs, dial.thresholds(self), strict=True)
        routings = tuple(_routing(output, threshold, mask_T) for output, threshold in gates)
        if labels_BS is None:
            return ModelOutput(logits_BSV, routings)
        wide_TV = logits_BSV.flatten(0, 1).to(torch.promote_types(logits_BSV.dtype, torch.float32))
        losses = F.cross_entropy(wide_TV, labels_BS.flatten(), ignore_index=NO_LABEL, reduction=reduction)
        return LossOutput(losses if reduction == "sum" else losses.view_as(labels_BS), routings)

    def set_thresholds(self, thresholds: float | list[float]) -> None:
        """Turn the density dial: one number, or one for each MoE layer. ConfigError for another number of them."""
        try:
            self.inner.set_thresholds(thresholds)
        except ValueError as error:
            raise ConfigError(str(error)) from None


def _routing(output: modeling_relu_moe.GateOutput, threshold: float, mask_T: Tensor | None) -> Routing:
    weights_TE, routing_map_TE = output.weights_TE, output.logits_TE > threshold
    if mask_T is not None:
        weights_TE, routing_map_TE = weights_TE.masked_fill(~mask_T[:, None], 0), routing_map_TE & mask_T[:, None]
    return Routing(weights_TE, routing_map_TE, output.logits_TE, token_mask_T=mask_T)
