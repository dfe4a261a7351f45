"""Whole training steps that were measured, as jobs and layouts whose cost can be predicted."""

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from remoe.distributed.config import ParallelConfig
from remoe.distributed.planning import Estimate, Job, estimate, machine
from remoe.recipes.catalog import read_config
from remoe.training.job import job_of

VOCABULARY = 50257
"""Of models whose config leaves it open, as the benchmarks have it."""
LAYOUT_SIZES = ("data_replicate", "expert", "tensor", "context", "pipeline")


class MeasuredStep(NamedTuple):
    """One row of a file of results."""

    source: str
    what: str
    gpu: str
    date: str
    """Year, month and day."""
    job: Job
    parallel: ParallelConfig
    tokens_per_second: float
    peak_bytes: int
    at_start: bool
    """With half of all gates open, where it is ReLU routing."""

    @property
    def is_for_fit(self) -> bool:
        """Whether the passes of a block are fitted to it: compiled steady steps on one GPU."""
        return self.parallel.shared_by == 1 and self.job.is_compiled and not self.at_start

    def predicted(self) -> Estimate:
        """What the formulas say of it."""
        return estimate(self.job, self.parallel, machine())


def measured_models(folder: Path) -> list[MeasuredStep]:
    """Steps on one GPU: gpu/model*.json, written by `remoe bench model`; but not those that failed its own checks."""
    found = []
    for path in sorted(folder.glob("gpu/model*.json")):
        content = json.loads(path.read_text())
        is_compiled = "--no-compile" not in content["command"]
        overrides = [*_after(content["command"], "--set"), f"train.compile={is_compiled}"]
        for row in content["rows"]:
            if row.get("kind") == "ours" and "mismatches" not in row:
                changes = [*overrides, f"model.router={row['candidate']}"]
                job = _job(row["model"], changes, row["micro_batch"], row["accumulation"])
                found.append(_measured(path, content, row, job, None))
    return found


def measured_layouts(folder: Path) -> list[MeasuredStep]:
    """Steps on several GPUs, and on one beside them: gpu/scale_out*.json, written by benchmarks/scale_out.py."""
    return [row for path in sorted(folder.glob("gpu/scale_out*.json")) for row in _layouts_in(path)]


def _layouts_in(path: Path) -> Iterator[MeasuredStep]:
    content = json.loads(path.read_text())
    about = content["machine"]
    command = about["command"]
    config = _after(command, "scale_out.py")[0]
    micro_batch, accumulation = (int((_after(command, key) or [default])[0]) for key, default in _SIZES)
    for row in content["rows"]:
        is_compiled = "--compile" in command
        changes = [*_after(command, "--set"), f"model.router={row['router']}", f"train.compile={is_compiled}"]
        job = _job(config, changes, micro_batch, accumulation * row["ranks"])
        yield _measured(path, about, row, job, row["parallel"])


_SIZES = (("--micro-batch", "8"), ("--accumulation", "4"))


def _measured(
    path: Path, about: Mapping[str, Any], row: Mapping[str, Any], job: Job, sizes: Mapping[str, Any] | None
) -> MeasuredStep:
    layout = {key: size for key, size in (sizes or {}).items() if key in LAYOUT_SIZES}
    sharded = (sizes or {}).get("sharded", "parameters")
    parallel = job.layout(row.get("ranks", 1), sharded, **layout)
    assert parallel is not None, f"{path}: a layout that was measured must be one"
    peak = row["peak_bytes"] if isinstance(row["peak_bytes"], int) else max(row["peak_bytes"])
    named = ", ".join(f"{key} {size}" for key, size in layout.items() if size > 1)
    what = f"{job.model.moe.router_name} on {row.get('ranks', 1)}" + (f", {named}" if named else "")
    at_start = row.get("phase") == "start"
    what += ", optimizer shared" if sharded == "optimizer" else ""
    what += ", at start" if at_start else ""
    gpu, date = about["gpus"][0], about["date"][:10]
    return MeasuredStep(path.name, what, gpu, date, job, parallel, row["tokens_per_second"], peak, at_start)


def _job(config: str, overrides: Sequence[str], micro_batch: int, micro_batches: int) -> Job:
    sizes = [f"train.micro_batch_size={micro_batch}", f"train.batch_size={micro_batch * micro_batches}"]
    run = read_config(config, [*overrides, *sizes])
    model = dataclasses.replace(run.model, vocab_size=run.model.vocab_size or VOCABULARY)
    return job_of(dataclasses.replace(run, model=model))


def _after(command: str, word: str) -> list[str]:
    """The words of a command that follow one, up to the next option."""
    words = shlex.split(command)
    start = next((place for place, found in enumerate(words) if found.endswith(word)), len(words))
    values = []
    for value in words[start + 1 :]:
        if value.startswith("--"):
            break
        values.append(value)
    return values
