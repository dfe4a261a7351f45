"""More places for metrics: TensorBoard, W&B, trackio. None of them can stop a run once it has begun."""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from remoe.errors import MissingExtraError


class Sink(Protocol):
    """Takes the metrics of each logged step."""

    def write(self, metrics: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers by path: `lm_loss`, `valid_loss_per_domain/code`, `layers/sparsity/03`; None is left out."""
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (list, tuple)):
            yield from flatten({f"{index:02d}": item for index, item in enumerate(value)}, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{key}", value


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What a sink takes of one line: all numbers by path but the step, for which each has a place of its own."""
    return {name: value for name, value in flatten(metrics) if name != "step"}


class TensorBoardSink:
    """Event files below the run's folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Add one scalar a number."""
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WandbSink:
    """A W&B run; offline where WANDB_MODE says so or no API key is known, so that nothing asks for one.

    A resumed run goes on in the same W&B run, by the id kept in the run's folder. Steps that W&B has seen already it
    leaves out.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        has_choice = "WANDB_MODE" in os.environ or bool(wandb.api.api_key)
        known = folder / "wandb" / "run-id"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "remoe"),
            name=str(config["name"]),
            dir=str(folder),
            config=dict(config),
            mode=None if has_choice else "offline",
            id=known.read_text() if step and known.is_file() else None,
            resume="allow",
            settings=wandb.Settings(console="off"),  # standard output stays the command's own
        )
        known.parent.mkdir(exist_ok=True)
        known.write_text(self._run.id)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Log the numbers of one step."""
        self._run.log(numbers(metrics), step=metrics["step"])

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class TrackioSink:
    """A trackio run in its local database; a resumed run goes on in the newest one of its name."""

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio = trackio
        name = str(config["name"]).replace("/", "-")
        trackio.init(project="remoe", name=name, config=dict(config), resume="allow" if step else "never")

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Log the numbers of one step."""
        self._trackio.log(numbers(metrics), step=metrics["step"])

    def close(self) -> None:
        """End the run."""
        self._trackio.finish()


SINKS: dict[str, Callable[[Path, Mapping[str, Any], int], Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "trackio": TrackioSink,
}


def check_sinks(names: Sequence[str]) -> None:
    """Raise MissingExtraError where the library of a sink is not installed; each sink has its library's name."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(name, name)


class Sinks:
    """The sinks of a run. One that fails is reported once and left out from then on."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._sinks: dict[str, Sink] = {}

    def open(self, names: Sequence[str], folder: Path, config: Mapping[str, Any], step: int) -> None:
        """Open sinks by name, after `step` steps."""
        for name in names:
            self._guard(name, lambda name=name: self._sinks.update({name: SINKS[name](folder, config, step)}))

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Hand one step's metrics to each sink."""
        for name, sink in list(self._sinks.items()):
            self._guard(name, lambda sink=sink: sink.write(metrics))

    def close(self) -> None:
        """Close each sink."""
        for name, sink in list(self._sinks.items()):
            self._guard(name, sink.close)
        self._sinks.clear()

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001  a metrics service must never cost a training run
            self._sinks.pop(name, None)
            self._warn(f"metrics sink {name} failed and is left out: {type(error).__name__}: {error}")
