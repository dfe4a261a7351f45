"""Which of the kernels' choices is fastest for each shape class: what the table in the repo is made from.

The kernel package says what there is to choose; here each choice runs inside the whole layer, forward and backward, on
variable counts. Parts (such as the tiles of one product) are settled one after the other, each with the best choices of
those before it, and its choices are timed in turn. The first part is a way to run all others: they are settled anew for
each of its choices, and what comes out is timed beside today's choices, which stay where nothing is faster. A choice
that fails or computes something else is passed over, and said.
"""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from remoe.bench import ours
from remoe.bench.clock import Clock, free
from remoe.bench.numerics import TENSORS, Expected, errors, expected, too_large
from remoe.bench.problem import Problem, Routing
from remoe.bench.results import Results, Row, Show, first_line
from remoe.bench.shapes import LayerShape
from remoe.errors import ConfigError, one_of

KERNELS = "remoe.kernels.expert_mlp.tuning"
ROUTE = "var"
SIZES = ("num_tokens", "hidden_size", "expert_size", "num_experts", "top_k")
"""What of a shape its choices depend on."""
_ROUNDS = 11


class Tunable(Protocol):
    """What the kernel package offers: the module KERNELS, or anything else with these functions."""

    def parts(self, shape: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> Mapping[str, Sequence[str]]:
        """What can be chosen at num_tokens, hidden_size, expert_size, num_experts, top_k: choices by part.

        The first choice of a part is today's. Choices are words or JSON, unique in their part.
        """
        ...

    def forced(self, part: str, choice: str) -> AbstractContextManager[object]:
        """Inside, the op runs this part with this choice, forward and backward."""
        ...

    def save(self, rows: Sequence[Mapping[str, Any]], path: Path | None) -> Path:
        """Write the table that the op reads, from rows with `shape`, `sizes`, `device`, `best` and `tried`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What to tune."""

    shapes: list[LayerShape]
    device: torch.device
    dtype: torch.dtype
    parts: list[str] = field(default_factory=list[str])
    """Those to settle, the others keep today's choice; none: all."""
    deadline_seconds: float | None = None
    path: Path | None = None
    """Every measurement, as JSON."""
    table: Path | None = None
    """Where the kernels' own table goes; None: its place in the package."""
    show: Show | None = None


def tunable() -> Tunable:
    """The kernel package's choices; ConfigError where this version has none."""
    try:
        return cast(Tunable, importlib.import_module(KERNELS))
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"there is nothing to tune: {error.name} is missing; run it on a machine with Triton"
        ) from None


def tune(tuning: Tuning, kernels: Tunable) -> Results:
    """Settle every shape and save the table; what begins after the deadline keeps today's choice and is left out."""
    started = time.perf_counter()
    clock = Clock(tuning.device)
    results = Results("tune", tuning.path, tuning.show, dtype=str(tuning.dtype).removeprefix("torch."))
    for shape in tuning.shapes:
        if tuning.deadline_seconds is not None and time.perf_counter() - started > tuning.deadline_seconds:
            results.add({"shape": shape.name, "note": "left out: deadline"})
            continue
        results.add(_Tuner(tuning, kernels, clock, shape).settled())
        free(tuning.device)
    settled = [row for row in results.rows if "best" in row]
    if settled:
        results.about["table"] = kernels.save(settled, tuning.table).name
    results.write()
    return results


class _Tuner:
    """One shape."""

    def __init__(self, tuning: Tuning, kernels: Tunable, clock: Clock, shape: LayerShape) -> None:
        self.tuning, self.kernels, self.clock, self.shape = tuning, kernels, clock, shape
        self.sizes = {key: getattr(shape, key) for key in SIZES}
        self.parts = self._parts()
        self.problem = Problem(shape, tuning.device, tuning.dtype)
        self.routing: Routing = self.problem.route(ROUTE)
        self.reference: Expected = expected(self.problem, self.routing)

    def settled(self) -> Row:
        """The best choice of each part, and the times of all."""
        (way, ways), *others = self.parts.items()
        today = {part: choices[0] for part, choices in self.parts.items()}
        settled = {choice: self._settle(today | {way: choice}, others) for choice in ways}
        all_choices = [today, *(best for best, _ in settled.values())]
        first_ms, *times = self._times(all_choices)
        measured = [(found, place) for place, found in enumerate([first_ms, *times]) if isinstance(found, float)]
        if not measured:
            return {"shape": self.shape.name, "note": f"no choice works: {first_ms}"}
        best_ms, winner = min(measured)  # today's choices where nothing is faster
        _, tried = settled[ways[max(0, winner - 1)]]
        return {
            "shape": self.shape.name,
            "sizes": self.sizes,
            "device": torch.cuda.get_device_name(self.tuning.device) if self.clock.is_cuda else "cpu",
            "best": all_choices[winner],
            "first_ms": first_ms,
            "best_ms": best_ms,
            "tried": {way: dict(zip(ways, times, strict=True))} | tried,
        }

    def _parts(self) -> dict[str, Sequence[str]]:
        """What can be chosen, of the parts that are asked for."""
        known = self.kernels.parts(self.sizes, self.tuning.dtype, self.tuning.device)
        for part in self.tuning.parts:
            if part not in known:
                raise ConfigError(f"--parts has {part!r}, {one_of(part, list(known))}")
        asked = self.tuning.parts or list(known)
        return {part: choices if part in asked else choices[:1] for part, choices in known.items()}

    def _settle(
        self, best: dict[str, str], parts: Sequence[tuple[str, Sequence[str]]]
    ) -> tuple[dict[str, str], dict[str, dict[str, float | str]]]:
        """The best choice of each of these parts, and the times of all."""
        tried: dict[str, dict[str, float | str]] = {}
        for part, choices in parts:
            times = self._times([best | {part: choice} for choice in choices])
            tried[part] = dict(zip(choices, times, strict=True))
            measured = {choice: found for choice, found in tried[part].items() if isinstance(found, float)}
            best = best | {part: min(measured, key=measured.__getitem__, default=best[part])}
        return best, tried

    def _times(self, all_choices: Sequence[Mapping[str, str]]) -> list[float | str]:
        """Milliseconds of each, taken in turn, or why it is passed over."""
        calls: list[Callable[[], Any] | str] = [self._prepared(choices) for choices in all_choices]
        usable = [call for call in calls if not isinstance(call, str)]
        times = iter(self.clock.medians_in_turn_ms(usable, _ROUNDS))
        found = [call if isinstance(call, str) else next(times) for call in calls]
        del calls, usable
        free(self.tuning.device)
        return found

    def _prepared(self, choices: Mapping[str, str]) -> Callable[[], Any] | str:
        try:
            return self._checked(choices)
        except Exception as error:  # noqa: BLE001 - a tile may be too large for the device, or miscompile
            free(self.tuning.device)
            return first_line(error)

    def _checked(self, choices: Mapping[str, str]) -> Callable[[], Any]:
        """The layer's two passes with these choices, as a graph on a GPU; ArithmeticError if they are wrong."""
        leaves = self.problem.leaves(self.routing)
        forward = ours.capacity(self.problem, self.routing)

        def call() -> tuple[torch.Tensor, ...]:
            with ExitStack() as stack:
                for part, choice in choices.items():
                    stack.enter_context(self.kernels.forced(part, choice))
                out_TH = forward()
                return out_TH, *torch.autograd.grad(out_TH, leaves, self.problem.grad_out_TH)

        found = errors(dict(zip(TENSORS, call(), strict=True)), self.reference.results, self.routing)
        wrong = too_large(found, self.reference.plain, self.tuning.dtype)
        if wrong:
            raise ArithmeticError(f"differs: {'; '.join(wrong)}")
        return self.clock.captured(call) if self.clock.is_cuda else call
