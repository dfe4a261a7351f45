"""Says when a layer starves or experts idle for long: both look fine in the whole model's sparsity."""

from collections.abc import Callable, Mapping
from typing import Any

STARVING_SHARE = 0.75
"""A layer with more of its tokens than this without an expert starves."""
PATIENCE = {"starving": 100, "idle": 1000}
"""Steps in a row after which a person hears of it; early in training both come and go."""
ADVICE = "sparsity.density_floor=0.5 with sparsity.revival_coef=0.01 brings them back"


class StarvationWatch:
    """Reads the lines of metrics.jsonl and says each thing once. Layers count from 0 among those with experts."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._since: dict[tuple[str, int], int] = {}
        self._said: set[tuple[str, int]] = set()

    def see(self, metrics: Mapping[str, Any]) -> None:
        """Take one logged step."""
        step, layers = metrics["step"], metrics["layers"]
        for layer, share in enumerate(layers.get("no_expert", ())):
            text = f"more than {STARVING_SHARE:.0%} of the tokens in layer {layer} have had no expert"
            self._follow(("starving", layer), share > STARVING_SHARE, step, text)
        for layer, count in enumerate(layers.get("idle_experts", ())):
            self._follow(("idle", layer), count > 0, step, f"layer {layer} has had experts that no token used")

    def _follow(self, key: tuple[str, int], holds: bool, step: int, text: str) -> None:
        if not holds:
            self._since.pop(key, None)
            return
        since = self._since.setdefault(key, step)
        if step - since >= PATIENCE[key[0]] and key not in self._said:
            self._said.add(key)
            self._say(f"{text} since step {since}; {ADVICE}")
