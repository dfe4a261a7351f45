"""What a run tells a person while it trains: a bar on a terminal, plain lines elsewhere."""

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from remoe.training.run import Run

PLAIN_LINES = 20
"""About how many lines a run prints where there is no terminal."""
STRAGGLES_FROM = 1.2
"""A process whose own work takes this much longer than the median one's holds the others up: worth a word."""


class Reporter(Protocol):
    """Hears about a run. Steps count optimizer steps from 1."""

    def start(self, name: str, total: int, done: int) -> None:
        """A run of `total` steps begins, or goes on after `done`."""
        ...

    def step(self, metrics: Mapping[str, Any]) -> None:
        """A step was logged: one line of metrics.jsonl."""
        ...

    def message(self, text: str) -> None:
        """Something that a person should know."""
        ...

    def finish(self, run: "Run") -> None:
        """The run has ended."""
        ...


class LogReporter:
    """Messages to Python's logging, nothing else; what `train` uses unless told otherwise."""

    def start(self, name: str, total: int, done: int) -> None:
        """Say nothing."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Say nothing."""

    def message(self, text: str) -> None:
        """Log as a warning."""
        logging.getLogger("remoe").warning(text)

    def finish(self, run: "Run") -> None:
        """Say nothing."""


class SilentReporter(LogReporter):
    """Of a rank that is not the first: the first one speaks for all."""

    def message(self, text: str) -> None:
        """Say nothing."""


class PlainReporter:
    """Plain lines for logs and pipes: about twenty a run, and one for each validation."""

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self._say = say
        self._started = time.monotonic()
        self._total, self._done, self._next = 0, 0, 0

    def start(self, name: str, total: int, done: int) -> None:
        """Begin to count."""
        self._started, self._total, self._done, self._next = time.monotonic(), total, done, done + 1
        self._say(f"{name}: {total} steps" + (f", going on after {done}" if done else ""))

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Print a line if one is due."""
        step = metrics["step"]
        if step < self._next and step < self._total and "valid_loss" not in metrics:
            return
        self._next = step + max(1, self._total // PLAIN_LINES)
        left = (time.monotonic() - self._started) / max(1, step - self._done) * (self._total - step)
        self._say(f"step {step}/{self._total}  {describe(metrics)}  {clock(left)} left")

    def message(self, text: str) -> None:
        """Print the text."""
        self._say(text)

    def finish(self, run: "Run") -> None:
        """Print nothing more: the caller says how it went."""


class BarReporter:
    """A progress bar with loss, tokens per second, sparsity, coefficient and time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._valid_loss = ""

    def start(self, name: str, total: int, done: int) -> None:
        """Show the bar."""
        self._task = self._progress.add_task(name, total=total, completed=done, numbers="")
        self._progress.start()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Move the bar."""
        if metrics.get("valid_loss") is not None:
            self._valid_loss = f"  valid {metrics['valid_loss']:.3f}"
        text = describe({key: value for key, value in metrics.items() if key != "valid_loss"})
        self._progress.update(self._task, completed=metrics["step"], numbers=text + self._valid_loss)

    def message(self, text: str) -> None:
        """Print the text above the bar."""
        self._progress.console.print(text, markup=False, highlight=False)

    def finish(self, run: "Run") -> None:
        """Leave the bar as it stands."""
        self._progress.stop()


def terminal_reporter() -> Reporter:
    """A bar where standard error is a terminal that can draw one, else plain lines."""
    can_draw = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return BarReporter() if can_draw else PlainReporter()


def describe(metrics: Mapping[str, Any]) -> str:
    """The numbers worth watching, on one line; those that are missing are left out."""
    parts = (
        ("loss", "lm_loss", "{:.3f}"),
        ("valid", "valid_loss", "{:.3f}"),
        ("sparsity", "sparsity", "{:.3f}"),
        ("coef", "sparsity_coef", "{:.1e}"),
        ("skipped", "skipped", "{}"),
        ("", "tokens_per_second", "{:,.0f} tok/s"),
    )
    shown = ((label, form.format(metrics[key])) for label, key, form in parts if _is_worth_showing(metrics, key))
    return "  ".join([*(f"{label} {text}".strip() for label, text in shown), *_straggler(metrics)])


def _straggler(metrics: Mapping[str, Any]) -> list[str]:
    ratio = metrics.get("slowest_ratio") or 0.0
    return [f"process {metrics['slowest_rank']} {ratio:.1f}x slower"] if ratio >= STRAGGLES_FROM else []


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _is_worth_showing(metrics: Mapping[str, Any], key: str) -> bool:
    value = metrics.get(key)
    return value is not None and value == value and not (key == "skipped" and value == 0)  # NaN is not equal to itself
