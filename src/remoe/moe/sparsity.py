"""The adaptive coefficient of the L1 term: measured counts in, coefficient out (ReMoE eq. 7)."""

import math
from typing import Any

import torch
from torch import Tensor

from remoe.errors import ConfigError
from remoe.moe.update_rule import UpdateRule

Count = Tensor | int


class SparsityController:
    """coef_{i+1} = coef_i * multiplier^sign(S* - S_i), with target sparsity S* = 1 - top_k/num_experts.

    Works in log space between bounds, in float64: no underflow, no wind-up. Counts are compared as integers, so a tie
    is a tie. `num_layers` keeps one coefficient a layer. `released` follows the released code, where a tie lowers.
    The last four settings are those of UpdateRule: smaller steps near the target, none very near it, an average over
    steps. Raises ConfigError for settings out of range.
    """

    def __init__(
        self, top_k: int, num_experts: int, init: float = 1e-8, multiplier: float = 1.2, min_coef: float = 1e-16,
        max_coef: float = 1e4, num_layers: int | None = None, released: bool = False, rule: str = "sign",
        full_step_at: float = 0.02, dead_band: float = 0.0, average: float = 0.0,
    ) -> None:  # fmt: skip
        if multiplier <= 1:
            raise ConfigError(f"multiplier is {multiplier}, must be above 1: the coefficient could not grow; try 1.2")
        if not 0 < min_coef <= init <= max_coef:
            raise ConfigError(f"init is {init}, must be between min_coef = {min_coef} (above 0) and {max_coef}")
        if not 1 <= top_k <= num_experts:
            raise ConfigError(f"top_k is {top_k}, must be between 1 and num_experts = {num_experts}")
        self.rule = UpdateRule(rule=rule, full_step_at=full_step_at, dead_band=dead_band, average=average)
        if released and self.rule.is_smoother:
            raise ConfigError("released is true, so rule, dead_band and average must be left at their defaults")
        self.top_k = top_k
        self.num_experts = num_experts
        self.released = released
        self.log_multiplier = math.log(multiplier)
        self.log_bounds = (math.log(min_coef), math.log(max_coef))
        shape = () if num_layers is None else (num_layers,)
        self.log_coef = torch.full(shape, math.log(init), dtype=torch.float64)
        self.distance_sum = torch.zeros(shape, dtype=torch.float64)
        self.distance_weight = torch.zeros(shape, dtype=torch.float64)

    @property
    def coef(self) -> Tensor:
        """The coefficient, fp32: 0-dim, or [L] with one a layer."""
        return self.log_coef.exp().to(torch.float32)

    @property
    def target_sparsity(self) -> float:
        """S* = 1 - top_k / num_experts."""
        return 1 - self.top_k / self.num_experts

    @torch.no_grad()
    def update(self, active: Count, total: Count, skipped: Tensor | bool | None = None) -> None:
        """Move one step towards the target; once per optimizer step, with counts summed over all ranks.

        `active` of `total` (token, expert) pairs were on; [L] each with one coefficient a layer. A total of 0 or a
        skipped step leaves the coefficient alone. Nothing waits for the device.
        """
        device = self.log_coef.device
        total = torch.as_tensor(total, device=device)
        excess = torch.as_tensor(active, device=device) * self.num_experts - total * self.top_k
        held = total == 0
        if skipped is not None:
            held = held | torch.as_tensor(skipped, device=device)
        # The integer's sign survives the division, so that a tie stays a tie.
        distance = excess.to(torch.float64) / (total * self.num_experts).clamp(min=1)
        if self.rule.average > 0:
            distance = self._averaged(distance, held)
        move = torch.where(distance > 0, 1, -1).to(torch.float64) if self.released else self.rule.move(distance)
        self.log_coef.add_(move.masked_fill(held, 0), alpha=self.log_multiplier).clamp_(*self.log_bounds)

    def _averaged(self, distance: Tensor, held: Tensor) -> Tensor:
        """The moving average of the distances so far, this one included; a held step leaves it alone."""
        past = self.rule.average
        for state, new in ((self.distance_sum, distance), (self.distance_weight, torch.ones_like(distance))):
            state.copy_(torch.where(held, state, past * state + (1 - past) * new))
        return self.distance_sum / self.distance_weight.clamp(min=torch.finfo(torch.float64).tiny)

    def to(self, device: torch.device | str) -> "SparsityController":
        """Move the state to a device; counts must then be there too, or be ints."""
        for name, value in self._state().items():
            setattr(self, name, value.to(device))
        return self

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, in float64: the log-coefficient and, where there is one, the moving average."""
        return self._state() if self.rule.average > 0 else {"log_coef": self.log_coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state; its names and shapes must fit (ConfigError)."""
        own = self.state_dict()
        if state.keys() != own.keys():
            raise ConfigError(
                f"the saved sparsity state holds {', '.join(state)}, this run needs {', '.join(own)}; "
                "keep sparsity.average as it was"
            )
        log_coef = state["log_coef"]
        if log_coef.shape != self.log_coef.shape:
            raise ConfigError(
                f"the saved sparsity state has shape {list(log_coef.shape)}, this run needs "
                f"{list(self.log_coef.shape)}; keep sparsity.per_layer as it was"
            )
        for name, value in own.items():
            value.copy_(state[name])

    def _state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("log_coef", "distance_sum", "distance_weight")}
