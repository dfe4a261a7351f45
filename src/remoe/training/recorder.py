"""From measured values on the device to lines of metrics.jsonl, sinks and the reporter."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from remoe.errors import TrainingError
from remoe.training.config import TrainConfig
from remoe.training.metrics import Metrics, MetricsFile
from remoe.training.objective import averages_layers
from remoe.training.pace import slowest
from remoe.training.progress import Reporter
from remoe.training.readout import Readout
from remoe.training.sinks import Sinks
from remoe.training.starvation import StarvationWatch

Numbers = Mapping[str, Any]
SCALARS = ("lm_loss", "loss", "grad_norm", "load_balancing_coef", "flip_rate", "flip_count")
TERMS = ("sparsity_l1", "load_balancing", "router_z", "revival")
ALWAYS = ("sparsity_l1", "load_balancing")


class Pending(NamedTuple):
    """A logged step whose numbers are still on their way to the host."""

    readout: Readout
    known: Metrics
    measured: Metrics


class Recorder:
    """Writes the line of a logged step once its numbers have arrived: on a GPU with the next logged step's call.

    Raises TrainingError when `train.max_bad_steps` steps in a row were not finite.
    """

    def __init__(self, config: TrainConfig, file: MetricsFile, sinks: Sinks, reporter: Reporter) -> None:
        self.config = config
        self.file = file
        self.sinks = sinks
        self.reporter = reporter
        self._watch = StarvationWatch(reporter.message)
        self._pending: Pending | None = None
        self._since = time.perf_counter()
        self._paused_seconds = 0.0
        self._seconds_each = 0.0
        self._seconds, self._steps = 0.0, 0

    def time_steps(self, num_steps: int, wait: bool) -> None:
        """So many steps (1 or more) now count: they share the time since the last call equally.

        Each is then counted by `count_step`. `wait` lets a GPU finish them first.
        """
        if wait and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._seconds_each = max(now - self._since - self._paused_seconds, 1e-9) / num_steps
        self._since, self._paused_seconds = now, 0.0

    def count_step(self) -> None:
        """A step was taken, in its share of the time."""
        self._seconds += self._seconds_each
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not part of the steps' time."""
        start = time.perf_counter()
        yield
        self._paused_seconds += time.perf_counter() - start

    def log(self, step: int, readout: Readout, lr: float, measured: Metrics) -> None:
        """Take a step's readout; `measured` holds what is known on the host already, such as validation losses."""
        self.flush()
        tokens = self.config.train.batch_size * self.config.data.sequence_length
        known = {
            "step": step,
            "tokens": step * tokens,
            "lr": lr,
            "tokens_per_second": self._steps * tokens / self._seconds,
            "step_seconds": self._seconds / self._steps,
        }
        self._pending = Pending(readout, known, measured)
        self._seconds, self._steps = 0.0, 0
        if readout.has_arrived:
            self.flush()

    def flush(self) -> None:
        """Write the pending line, if there is one."""
        if self._pending is None:
            return
        (readout, known, measured), self._pending = self._pending, None
        numbers = readout.read()
        metrics = summarise(numbers, known, self.config.sparsity.mode) | measured
        self.file.write(metrics)
        self.sinks.write(metrics)
        self.reporter.step(metrics)
        if metrics["sparsity_coef"] is not None:  # only routers that the L1 term steers can starve
            self._watch.see(metrics)
        self._check_bad_steps(int(numbers["skipped_in_a_row"]), metrics["step"])

    def close(self) -> None:
        """Close file and sinks."""
        self.file.close()
        self.sinks.close()

    def _check_bad_steps(self, bad_steps: int, step: int) -> None:
        if bad_steps < self.config.train.max_bad_steps:
            return
        raise TrainingError(
            f"step {step} is number {bad_steps} in a row whose loss or gradient is not finite "
            f"(train.max_bad_steps = {self.config.train.max_bad_steps}); weights are those before them; "
            "lower optimizer.lr, lengthen optimizer.warmup_steps, or try train.precision=fp32"
        )


def summarise(numbers: Numbers, known: Metrics, mode: str) -> Metrics:
    """One line of metrics from a step's numbers; `mode` is sparsity.mode, which decides how layers add up."""
    metrics: Metrics = dict(known)
    metrics |= {name: numbers[name] for name in SCALARS if name in numbers}
    metrics["skipped"] = int(numbers["skipped"])
    metrics |= {name: over_layers(name, numbers.get(name), mode) for name in TERMS if name in numbers or name in ALWAYS}
    metrics["sparsity_coef"] = _mean(numbers.get("sparsity_coef"))
    metrics |= slowest(numbers.get("rank_seconds"))
    layers = {name: numbers[name] for name in TERMS if name in numbers}
    if isinstance(numbers.get("sparsity_coef"), list):
        layers["sparsity_coef"] = numbers["sparsity_coef"]
    if "active" not in numbers:
        return metrics | {"sparsity": None, "active_experts": None, "layers": layers}
    active, total, tokens = sum(numbers["active"]), sum(numbers["total"]), sum(numbers["tokens"])
    metrics["sparsity"] = 1 - active / total
    metrics["active_experts"] = active / tokens
    return metrics | {"layers": layers | routing_lists(numbers)}


def routing_lists(numbers: Numbers) -> dict[str, list[float]]:
    """Per-layer lists that follow from a step's counts."""
    tokens = numbers["tokens"]
    return {
        "sparsity": [1 - a / t for a, t in zip(numbers["active"], numbers["total"], strict=True)],
        "no_expert": [n / t for n, t in zip(numbers["without_expert"], tokens, strict=True)],
        "idle_experts": [int(n) for n in numbers["idle_experts"]],
        "max_load": [n / t for n, t in zip(numbers["max_tokens"], tokens, strict=True)],
    }


def over_layers(name: str, values: list[float] | None, mode: str) -> float | None:
    """A term of the whole model from its layers' values, as in the objective; None where it was not measured."""
    if values is None:
        return None
    return sum(values) / (len(values) if averages_layers(name, mode) else 1)


def _mean(value: float | list[float] | None) -> float | None:
    return sum(value) / len(value) if isinstance(value, list) else value
