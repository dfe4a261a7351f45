"""What the figures know of a run: its log, its routing counts and some of its text; plain data, kept as JSON."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from remoe.analysis.collect import TextCounts
from remoe.analysis.metrics import Metrics
from remoe.errors import CheckpointError
from remoe.eval.density import DensityCurve, curve_from

SCHEMA = 1
MANY_RUNS = 4
COLOURS = 8


@dataclass(frozen=True, kw_only=True)
class Passage:
    """The start of a validation document: its tokens and how many experts each used in each MoE layer."""

    domain: str
    tokens: tuple[str, ...]
    active_TL: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A prompt from the validation text and how the model goes on."""

    domain: str
    prompt: str
    continuation: str


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run. `counts` is None for a dense model, or one known by its log alone.

    `token_texts` are the texts of `counts.token_ids_U`; `density` is there once `remoe density` measured it.
    """

    name: str
    router: str
    config: Mapping[str, Any]
    corpus: Mapping[str, Any]
    total_parameters: int
    active_parameters: int
    metrics: Metrics
    counts: TextCounts | None
    token_texts: tuple[str, ...]
    passages: tuple[Passage, ...]
    generations: tuple[Generation, ...]
    density: DensityCurve | None = None

    @property
    def target_sparsity(self) -> float:
        """1 - k/E."""
        return 1 - self.config["model"]["top_k"] / self.config["model"]["num_experts"]


def routed(runs: Sequence[RunRecord]) -> list[tuple[int, RunRecord, TextCounts]]:
    """The runs that route, each with its place (its look in every chart) and its counts."""
    placed = zip(places(runs), runs, strict=True)
    return [(place, run, run.counts) for place, run in placed if run.counts is not None]


def setups(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """The runs in groups that differ in nothing but name and seed."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key not in ("name", "seed")}
        groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(run)
    return list(groups.values())


def places(runs: Sequence[RunRecord]) -> list[int]:
    """A number for each run that decides how charts draw it: runs of one setup get one colour and differ in dashes."""
    found = {
        run.name: setup % COLOURS + COLOURS * (seed + setup // COLOURS)
        for setup, group in enumerate(setups(runs))
        for seed, run in enumerate(group)
    }
    return [found[run.name] for run in runs]


def shown_as_text(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs whose tokens and texts a report shows: all of a few, of more than four the first of each setup."""
    return list(runs) if len(runs) <= MANY_RUNS else [group[0] for group in setups(runs)]


def save_records(runs: Sequence[RunRecord], path: Path) -> None:
    """Write all that a report shows as JSON, so that it can be drawn again without the models."""
    content = {"schema": SCHEMA, "runs": [dataclasses.asdict(run) for run in runs]}
    path.write_text(json.dumps(content, default=_plain, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def load_records(path: Path) -> list[RunRecord]:
    """Read what `save_records` wrote; CheckpointError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise CheckpointError(f"{path} has schema {content['schema']}, must be {SCHEMA}; run `remoe analyze` again")
        return [_record(run) for run in content["runs"]]
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; `remoe analyze RUN` writes it beside the report") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path} is not the analysis.json of a report; `remoe analyze RUN` writes one") from None


def _record(values: dict[str, Any]) -> RunRecord:
    passages = [
        Passage(domain=p["domain"], tokens=tuple(p["tokens"]), active_TL=_integers(p["active_TL"]))
        for p in values["passages"]
    ]
    built = {
        "metrics": Metrics(tuple(values["metrics"]["rows"])),
        "counts": _counts(values["counts"]),
        "token_texts": tuple(values["token_texts"]),
        "passages": tuple(passages),
        "generations": tuple(Generation(**generation) for generation in values["generations"]),
        "density": curve_from(values["density"]) if values.get("density") else None,
    }
    return RunRecord(**values | built)


def _counts(values: dict[str, Any] | None) -> TextCounts | None:
    if values is None:
        return None
    fields = {field.name: field.type for field in dataclasses.fields(TextCounts)}
    built: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    built |= {name: _integers(values[name]) for name, kind in fields.items() if kind is np.ndarray}
    return TextCounts(**built)


def _integers(values: list[Any]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} does not belong in a record")
