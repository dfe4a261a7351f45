"""A run's folder: what it holds, how it is claimed for a new run, and how others look at it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from remoe.config import from_dict, read_yaml, to_yaml
from remoe.errors import CheckpointError, ConfigError
from remoe.training.config import TrainConfig
from remoe.training.metrics import Metrics, last_value, read_metrics

CONFIG, METRICS, TOKENIZER, CHECKPOINTS = "config.yaml", "metrics.jsonl", "tokenizer", "checkpoints"
DENSITY = "density.json"
REPORT = ("report.html", "analysis.json", DENSITY, "report")
OWN_ENTRIES = (CONFIG, METRICS, TOKENIZER, CHECKPOINTS, *REPORT, "tensorboard", "wandb")


@dataclass(frozen=True)
class Run:
    """A run on disk, finished or not. `config` is the resolved one."""

    path: Path
    config: TrainConfig

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """Look at an existing run; CheckpointError where the folder is none or its config is empty."""
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise CheckpointError(f"{path} is not a run: it has no {CONFIG}; `remoe runs` lists those there are")
        values = read_yaml(path / CONFIG)
        if not values:
            raise CheckpointError(
                f"{path / CONFIG} is empty, must be the run's config; --overwrite begins the run anew"
            )
        return cls(path, from_dict(TrainConfig, values))

    def metrics(self) -> list[Metrics]:
        """The lines of metrics.jsonl, read anew each time: for several numbers of a run, ask once."""
        return read_metrics(self.path / METRICS)

    @property
    def valid_loss(self) -> float:
        """The last measured validation loss in nats; NaN where none was measured yet."""
        return last_value(self.metrics(), "valid_loss", float("nan"))

    @property
    def step(self) -> int:
        """The last logged step."""
        return last_value(self.metrics(), "step", 0)

    @property
    def tokens(self) -> int:
        """Tokens trained on, up to the last logged step."""
        return last_value(self.metrics(), "tokens", 0)

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.path / CHECKPOINTS


def is_run(path: Path) -> bool:
    """Whether a folder holds (part of) a run."""
    return any((path / entry).exists() for entry in (CONFIG, METRICS, CHECKPOINTS))


def check_request(path: Path, resume: bool, overwrite: bool) -> None:
    """Raise ConfigError where no run can be at this path, or where the flags contradict each other."""
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other: go on with the run, or begin it anew")
    file = next((place for place in (path, *path.parents) if place.is_file()), None)
    if file is not None:
        raise ConfigError(f"{file} is a file, must be a folder of runs or a run's own; choose another name")


def check_claim(path: Path, may_exist: bool) -> None:
    """Raise ConfigError where there is a run that was not asked for. Changes nothing."""
    if is_run(path) and not may_exist:
        raise ConfigError(
            f"run {path} exists; --resume goes on with it, --overwrite begins it anew, or set another name"
        )


def clear(path: Path) -> None:
    """Remove a run's own files from its folder, so that it can begin anew; anything else stays."""
    for entry in OWN_ENTRIES:
        target = path / entry
        if target.is_dir() and not target.is_symlink():  # what a link points to is not the run's
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


def write_config(path: Path, config: TrainConfig) -> None:
    """Write the resolved config, whole or not at all."""
    partial = path / f"{CONFIG}.tmp"
    partial.unlink(missing_ok=True)  # it may be a link to elsewhere
    partial.write_text(to_yaml(config), encoding="utf-8")
    partial.replace(path / CONFIG)
