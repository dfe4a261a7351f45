"""One MoE layer, forward and backward: ours, the peers, a dense MLP, and what the machine allows.

Timed is what follows the router's product: topk starts from the experts' indices and weights, the others from gates
[T, E] that are 0 where an expert is off, so that making lists counts. Gradients are those of the hidden states, both
weights and the gates.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remoe.bench import ours, peers
from remoe.bench.clock import Clock, free
from remoe.bench.limits import Limits, measure_limits
from remoe.bench.numerics import TENSORS, Expected, errors, expected, of_another_layer, too_large
from remoe.bench.ours import Builder, Forward
from remoe.bench.problem import ROUTES, Problem, Routing
from remoe.bench.profile import profile
from remoe.bench.results import Results, Row, Show, first_line
from remoe.bench.shapes import LayerShape

PROFILES = "profile"
_EVEN_ROUNDS = 15
Timed = Callable[[Callable[[], Any]], Callable[[], Any]]
"""Makes of a call what is timed: a graph of it, or the call itself."""


@dataclass(frozen=True, kw_only=True)
class LayerBench:
    """What to measure."""

    shapes: list[LayerShape]
    peers: list[str]
    ours: list[str] = field(default_factory=lambda: ["remoe"])
    device: torch.device
    dtype: torch.dtype
    deadline_seconds: float | None = None
    profile: bool = False
    path: Path | None = None
    show: Show | None = None


class Candidate:
    """One column of the benchmark."""

    def __init__(self, name: str, kind: str, build: Builder, is_compared_on_even_routes: bool = False) -> None:
        self.name, self.kind, self.build = name, kind, build
        self.is_compared_on_even_routes = is_compared_on_even_routes

    def routes(self, shape: LayerShape) -> list[str]:
        """What it is measured on."""
        if self.kind == "ceiling":
            return ["topk" if shape.has_fixed_k else "var"]
        if not shape.has_fixed_k:
            return ["var"]
        return list(ROUTES) if self.is_compared_on_even_routes else ["topk", "var"]


def bench_layer(config: LayerBench) -> Results:
    """Measure every candidate at every shape; `results.check()` then raises for results that are not the layer's."""
    started = time.perf_counter()
    clock = Clock(config.device)
    limits = measure_limits(clock, config.dtype)
    about = {"dtype": str(config.dtype).removeprefix("torch."), "limits": vars(limits)}
    results = Results("layer", config.path, config.show, **about)
    for name in config.peers:
        if reason := peers.missing(name):
            results.add({"shape": "all", "candidate": name, "kind": "peer", "note": reason})
    for shape in config.shapes:
        if _is_late(config, started):
            results.add({"shape": shape.name, "note": "left out: deadline"})
            continue
        bench = _ShapeBench(config, clock, limits, shape)
        for row in bench.rows(lambda: _is_late(config, started)):
            results.add(row)
        free(config.device)
    results.write()
    return results


def candidates(config: LayerBench) -> list[Candidate]:
    """Ours first: what comes after a deadline is left out."""
    own = [Candidate(name, "ours", ours.COLUMNS[name], name == config.ours[0]) for name in config.ours]
    return own + [
        Candidate(name, "ceiling" if name == peers.CEILING else "peer", _peer_builder(name))
        for name in config.peers
        if peers.missing(name) is None
    ]


def _peer_builder(name: str) -> Builder:
    return lambda problem, routing: peers.build(name, problem, routing)


def _is_late(config: LayerBench, started: float) -> bool:
    return config.deadline_seconds is not None and time.perf_counter() - started > config.deadline_seconds


class _ShapeBench:
    """All candidates at one shape, on the same tensors."""

    def __init__(self, config: LayerBench, clock: Clock, limits: Limits, shape: LayerShape) -> None:
        self.config, self.clock, self.limits, self.shape = config, clock, limits, shape
        self.problem = Problem(shape, config.device, config.dtype)
        self.routings: dict[str, Routing] = {}
        self.expected: dict[str, Expected] = {}

    def rows(self, is_late: Callable[[], bool]) -> Iterator[Row]:
        for route, candidate in itertools.product(ROUTES, candidates(self.config)):
            if route not in candidate.routes(self.shape):
                continue
            row = self._described(candidate, route)
            if is_late():
                yield row | {"note": "left out: deadline"}
                continue
            yield row | self._tried(candidate, route)
            free(self.config.device)

    def _described(self, candidate: Candidate, route: str) -> Row:
        shape = self.shape
        return {
            "shape": shape.name,
            "route": route,
            "candidate": candidate.name,
            "kind": candidate.kind,
            "sizes": [shape.num_tokens, shape.hidden_size, shape.expert_size, shape.num_experts, shape.top_k],
            "floor_forward_ms": self.limits.floor_ms(shape, backward=False),
            "floor_ms": self.limits.floor_ms(shape, backward=True),
            "target_ms": shape.target_ms,
        }

    def _tried(self, candidate: Candidate, route: str) -> Row:
        """A measurement, or why there is none."""
        try:
            return self._measured(candidate, route)
        except peers.NotApplicable as reason:
            return {"note": str(reason)}
        except Exception as error:  # noqa: BLE001 - peers fail in all ways; the others still count
            message = first_line(error)
            if candidate.kind != "ours":
                return {"error": message}
            return {
                "error": message,
                "mismatches": [f"{candidate.name} at {self.shape.name}/{route} failed: {message}"],
            }

    def _measured(self, candidate: Candidate, route: str) -> Row:
        routing = self._routing(route)
        forward = candidate.build(self.problem, routing)
        leaves = getattr(forward, "leaves", self.problem.leaves(routing))
        run = _Run(forward, leaves, self.problem.grad_out_TH)
        row: Row = {"first_call_seconds": self.clock.first_seconds(run.both)}
        if candidate.kind != "ceiling":
            row |= self._checked(candidate, route, run)
        timed = self.clock.captured if isinstance(forward, ours.Captured) else _as_it_is
        both = timed(run.both)
        row["forward_ms"] = self.clock.median_ms(timed(run.forward))
        row["forward_backward_ms"] = self.clock.median_ms(both)
        if route == "even_var":
            row["over_even_fixed"] = self._over_even_fixed(candidate, both, timed)
        row["forward_tflops"] = self.shape.flops() / row["forward_ms"] / 1e9
        row["tflops"] = self.shape.flops(backward=True) / row["forward_backward_ms"] / 1e9
        memory = self.clock.memory(run.forward, run.backward)
        if memory is not None:
            row |= {"held_bytes": memory.held, "peak_bytes": memory.peak}
        if self.config.profile:
            row[PROFILES] = profile(run.both, self.shape, self.clock, self.limits.bytes_a_number)
        return row

    def _over_even_fixed(self, candidate: Candidate, variable: Callable[[], Any], timed: Timed) -> float:
        """Its time over that of as many rows at each expert with k a token, measured in turn."""
        routing = self._routing("even_fixed")
        run = _Run(candidate.build(self.problem, routing), self.problem.leaves(routing), self.problem.grad_out_TH)
        fixed_ms, variable_ms = self.clock.medians_in_turn_ms([timed(run.both), variable], _EVEN_ROUNDS)
        return variable_ms / fixed_ms

    def _checked(self, candidate: Candidate, route: str, run: "_Run") -> Row:
        reference = self._expected(route)
        found = errors(run.results(), reference.results, self._routing(route))
        if candidate.kind == "ours":
            wrong = too_large(found, reference.plain, self.config.dtype)
        else:
            wrong = of_another_layer(found)
        named = [f"{candidate.name} at {self.shape.name}/{route}, {text}" for text in wrong]
        ratio = max(found[name] / max(reference.plain[name], 1e-300) for name in TENSORS)
        row: Row = {"errors": found, "plain_errors": reference.plain, "worst_error_ratio": ratio}
        return row | ({"mismatches": named} if named else {})

    def _routing(self, route: str) -> Routing:
        if route not in self.routings:
            self.routings[route] = self.problem.route(route)
        return self.routings[route]

    def _expected(self, route: str) -> Expected:
        if route not in self.expected:
            self.expected.clear()  # one reference at a time: at E = 128 it is 13 GB
            free(self.config.device)
            self.expected[route] = expected(self.problem, self._routing(route))
        return self.expected[route]


def _as_it_is(call: Callable[[], Any]) -> Callable[[], Any]:
    return call


class _Run:
    """A candidate's layer, forward and backward."""

    def __init__(self, forward: Forward, leaves: tuple[Tensor, ...], grad_out_TH: Tensor) -> None:
        self.forward, self.leaves, self.grad_out_TH = forward, leaves, grad_out_TH

    def backward(self, out_TH: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out_TH, self.leaves, self.grad_out_TH)

    def both(self) -> Any:
        return self.backward(self.forward())

    def results(self) -> dict[str, Tensor]:
        out_TH = self.forward()
        return dict(zip(TENSORS, (out_TH.detach(), *self.backward(out_TH)), strict=True))
