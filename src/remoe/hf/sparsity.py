"""The adaptive L1 coefficient of ReLU routing where transformers' Trainer or accelerate trains."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from remoe.errors import ConfigError
from remoe.moe import SparsityController

FIRST_COEF = 1e-8
"""Of a model that was not trained before (ReMoE §3)."""


class SparsityTracker:
    """Counts active experts in a model's training passes, and moves its coefficient once an optimizer step.

    `model` may be wrapped, as accelerate does. `per_layer` keeps one coefficient a layer; `init` is the first one
    (None: the model's own where it was trained before, else 1e-8). More settings are those of `SparsityController`.
    Each process weighs experts by the loads of its own micro-batch. ConfigError for a model without ReLU gates.
    """

    def __init__(
        self, model: nn.Module, *, init: float | None = None, per_layer: bool = False, **settings: Any
    ) -> None:
        self.model = _unwrapped(model)
        config = self.model.config
        num_layers = _num_routed_layers(self.model)
        self.controller = SparsityController(
            config.routed_top_k,
            config.routed_experts,
            init=init or config.sparsity_coef or FIRST_COEF,
            num_layers=num_layers if per_layer else None,
            **settings,
        ).to(next(self.model.parameters()).device)
        self.per_layer = per_layer
        self.density_L: Tensor | None = None
        """Share of pairs that were active in the last step."""
        self._counts_L2: Tensor | None = None
        self._handle = self.model.register_forward_hook(self._count)
        self.apply()

    def step(self, skipped: Tensor | bool = False) -> None:
        """Call after each optimizer step, on all processes; a skipped one leaves the coefficient alone."""
        counts_L2, self._counts_L2 = self._counts_L2, None
        if counts_L2 is None:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts_L2)
        active_L, total_L = counts_L2.unbind(1)
        self.density_L = active_L / total_L.clamp(min=1)
        counts = (active_L, total_L) if self.per_layer else (active_L.sum(), total_L.sum())
        self.controller.update(*counts, skipped)
        self.apply()

    def apply(self) -> None:
        """Let the model's loss use the controller's coefficient."""
        self.model.sparsity_coef = self.controller.coef

    def remember(self) -> None:
        """Write the coefficient into the model's config, from where the next training goes on; waits for the device."""
        self.model.config.sparsity_coef = float(self.controller.coef.mean())

    def figures(self) -> dict[str, float]:
        """For a log: the coefficient and the last step's sparsity; waits for the device."""
        coef = float(self.controller.coef.mean())
        if self.density_L is None:
            return {"sparsity_coef": coef}
        return {"sparsity_coef": coef, "sparsity": 1 - float(self.density_L.mean())}

    def close(self) -> None:
        """Count no more."""
        self._handle.remove()

    def _count(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        active_L = output.tokens_per_expert.sum(1)
        total_L = (output.num_tokens * output.tokens_per_expert.shape[1]).expand_as(active_L)
        counts_L2 = torch.stack((active_L, total_L), dim=1)
        self._counts_L2 = counts_L2 if self._counts_L2 is None else self._counts_L2 + counts_L2


class SparsityCallback(TrainerCallback, ExportableState):
    """`Trainer(..., callbacks=[SparsityCallback()])`: steers a ReLU-routed model to its k of E experts (ReMoE eq. 7).

    Takes the settings of SparsityTracker. Its state is in the Trainer's checkpoints and always restored from them; a
    saved model's config keeps the last coefficient. `sparsity` and `sparsity_coef` join the Trainer's log history.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.controller_state: dict[str, Any] = {}
        """As in a checkpoint."""
        self.tracker: SparsityTracker | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Begin, or go on from a checkpoint."""
        self.tracker = SparsityTracker(model, **self.settings)
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("controller_state")
        if saved:
            tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in saved.items()}
            self.tracker.controller.load_state_dict(tensors)
            self.tracker.apply()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Move the coefficient."""
        tracker = self._tracker()
        tracker.step(getattr(optimizer, "step_was_skipped", False))
        if control.should_save:
            tracker.remember()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the figures to lines about training."""
        if self.tracker is not None and logs is not None and "loss" in logs:
            figures = self.tracker.figures()
            logs.update(figures)
            state.log_history[-1].update(figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the coefficient in the model's config."""
        tracker = self._tracker()
        tracker.remember()
        tracker.close()

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the Trainer holds of this callback."""
        if self.tracker is not None:
            saved = self.tracker.controller.state_dict()
            self.controller_state = {name: value.tolist() for name, value in saved.items()}
        return {"args": self.settings, "attributes": {"controller_state": self.controller_state}}

    def _tracker(self) -> SparsityTracker:
        assert self.tracker is not None, "training begins with on_train_begin"
        return self.tracker


def _unwrapped(model: nn.Module) -> Any:
    """The routed model inside wrappers: ours, of an export, or converted. ConfigError where it has no ReLU gates."""
    found: Any = next((module for module in model.modules() if _is_ours(module)), None)
    if found is None or not found.config.is_relu_gated or not _num_routed_layers(found):
        router = "none" if found is None else repr(found.config.router_name)
        raise ConfigError(
            f"the router to steer is {router}, must be relu or recurrent_relu: only ReLU gates have a sparsity "
            "coefficient; leave the callback out"
        )
    return found


def _num_routed_layers(model: Any) -> int:
    """Layers with experts; a converted model lists its gates."""
    return len(model.gates) if hasattr(model, "gates") else sum(layer.is_sparse for layer in model.model.layers)


def _is_ours(module: Any) -> bool:
    """By class as well: wrappers such as PEFT's hand on attributes of what is inside."""
    is_routed = hasattr(getattr(module, "config", None), "is_relu_gated") and hasattr(module, "sparsity_coef")
    return is_routed and isinstance(module, PreTrainedModel)
