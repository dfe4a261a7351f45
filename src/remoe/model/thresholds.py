"""The density dial of a whole model: thresholds that are saved with it."""

import dataclasses
from collections.abc import Sequence

from remoe.model.causal_lm import ReMoEForCausalLM
from remoe.moe import dial


def set_thresholds(model: ReMoEForCausalLM, thresholds: float | Sequence[float]) -> None:
    """Set what router logits must be above: one number, or one for each MoE layer.

    0 is the trained gate; more uses fewer experts (docs/decisions/0025). It is saved with the model. Raises ConfigError
    for a model without ReLU gates, another number of layers, or a value that is not finite.
    """
    values = float(thresholds) if isinstance(thresholds, int | float) else list(thresholds)
    model.config = model.model.config = dataclasses.replace(model.config, thresholds=values)
    if dial.dials(model):
        dial.set_thresholds(model, model.config.layer_thresholds)
