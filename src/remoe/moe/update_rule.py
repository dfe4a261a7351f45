"""How far one update of the sparsity coefficient goes: the paper's sign rule, and smoother ones."""

from torch import Tensor

from remoe.config import check_choice, check_range, config_class, setting
from remoe.errors import ConfigError


@config_class
class UpdateRule:
    """From the distance to the target, S* - S, to a move of the log-coefficient in units of log multiplier.

    The default is ReMoE's: one whole step in the direction of the target, whatever the distance (eq. 7).
    """

    rule: str = setting("sign", "sign: whole steps (ReMoE eq. 7); proportional: smaller ones near the target")
    full_step_at: float = setting(0.02, "rule proportional: distance from the target sparsity of a whole step")
    dead_band: float = setting(0.0, "no step within this distance of the target sparsity")
    average: float = setting(0.0, "share of the past in the moving average of the distance; 0: this step's alone")

    def __post_init__(self) -> None:
        check_choice("sparsity.rule", self.rule, ("sign", "proportional"))
        check_range("sparsity.dead_band", self.dead_band, 0.0, 1.0)
        if not 0 < self.full_step_at <= 1:
            raise ConfigError(f"sparsity.full_step_at is {self.full_step_at}, must be above 0 and at most 1; try 0.02")
        if not 0 <= self.average < 1:
            raise ConfigError(f"sparsity.average is {self.average}, must be at least 0 and below 1; try 0.9")

    @property
    def is_smoother(self) -> bool:
        """Whether this differs from the paper's rule."""
        return self.rule != "sign" or self.dead_band > 0 or self.average > 0

    def move(self, distance: Tensor) -> Tensor:
        """Between -1 and 1: which part of a step to take, and in which direction."""
        move = distance.sign() if self.rule == "sign" else (distance / self.full_step_at).clamp(-1, 1)
        return move.masked_fill(distance.abs() <= self.dead_band, 0)
