"""The density dial of a whole model: thresholds that are saved with it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from remoe.model.causal_lm import ReMoEForCausalLM
from remoe.moe import dial


def set_thresholds(model: Any, thresholds: float | Sequence[float]) -> None:
    """Set what router logits must be above: one number, or one for each MoE layer.

    0 is the trained gate; more uses fewer experts (docs/decisions/0025). It is saved with the model. Raises ConfigError
    for a model without ReLU gates, another number of layers, or a value that is not finite. A model of another library
    that is called as ours is has a method of this name.
    """
    values = float(thresholds) if isinstance(thresholds, int | float) else list(thresholds)
    if not isinstance(model, ReMoEForCausalLM):
        return model.set_thresholds(values)
    model.config = model.model.config = dataclasses.replace(model.config, thresholds=values)
    if dial.dials(model):
        dial.set_thresholds(model, model.config.layer_thresholds)
