"""The adaptive coefficient of the L1 term: measured counts in, coefficient out (ReMoE eq. 7)."""

import math
from typing import Any

import torch
from torch import Tensor

from remoe.errors import ConfigError

Count = Tensor | int


class SparsityController:
    """coef_{i+1} = coef_i * multiplier^sign(S* - S_i), with target sparsity S* = 1 - top_k/num_experts.

    Works in log space between bounds, in float64: no underflow, no wind-up. Counts are compared as integers, so a tie
    is a tie. `num_layers` keeps one coefficient a layer. `released` follows the released code, where a tie lowers.
    Raises ConfigError for settings out of range.
    """

    def __init__(
        self, top_k: int, num_experts: int, init: float = 1e-8, multiplier: float = 1.2, min_coef: float = 1e-16,
        max_coef: float = 1e4, num_layers: int | None = None, released: bool = False,
    ) -> None:  # fmt: skip
        if multiplier <= 1:
            raise ConfigError(f"multiplier is {multiplier}, must be above 1: the coefficient could not grow; try 1.2")
        if not 0 < min_coef <= init <= max_coef:
            raise ConfigError(f"init is {init}, must be between min_coef = {min_coef} (above 0) and {max_coef}")
        if not 1 <= top_k <= num_experts:
            raise ConfigError(f"top_k is {top_k}, must be between 1 and num_experts = {num_experts}")
        self.top_k = top_k
        self.num_experts = num_experts
        self.released = released
        self.log_multiplier = math.log(multiplier)
        self.log_bounds = (math.log(min_coef), math.log(max_coef))
        shape = () if num_layers is None else (num_layers,)
        self.log_coef = torch.full(shape, math.log(init), dtype=torch.float64)

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
        direction = torch.where(excess > 0, 1, -1) if self.released else excess.sign()
        direction = direction.masked_fill(total == 0, 0)
        if skipped is not None:
            direction = direction.masked_fill(torch.as_tensor(skipped, device=device), 0)
        self.log_coef.add_(direction.to(torch.float64), alpha=self.log_multiplier).clamp_(*self.log_bounds)

    def to(self, device: torch.device | str) -> "SparsityController":
        """Move the state to a device; counts must then be there too, or be ints."""
        self.log_coef = self.log_coef.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint: the log-coefficient in float64."""
        return {"log_coef": self.log_coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state; its shape must fit (ConfigError)."""
        log_coef = state["log_coef"]
        if log_coef.shape != self.log_coef.shape:
            raise ConfigError(
                f"the saved sparsity state has shape {list(log_coef.shape)}, this run needs "
                f"{list(self.log_coef.shape)}; keep sparsity.per_layer as it was"
            )
        self.log_coef.copy_(log_coef)
