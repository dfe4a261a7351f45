"""Train the runs of a plan that are not finished yet, then set them side by side."""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from remoe.config import to_dict
from remoe.errors import CheckpointError, ConfigError
from remoe.recipes.budget import at_equal_flops, training_flops
from remoe.recipes.intervals import Interval, interval
from remoe.recipes.pairing import Pairing, check_pairing
from remoe.recipes.plan import Plan, Trial, differing_settings, trials
from remoe.recipes.results import differences, is_finished, late_mean, median_speed
from remoe.recipes.workers import run_in_processes
from remoe.training import lock
from remoe.training.metrics import Metrics, finite, last_value

if TYPE_CHECKING:
    from remoe.training import Run
    from remoe.training.config import TrainConfig

Say = Callable[[str], None]


class Row(NamedTuple):
    """One router's means over the seeds, and its paired difference of validation loss to the first router."""

    router: str
    valid_loss: Interval
    difference: Interval | None
    active_experts: float | None
    load_balancing: float | None
    """Mean over MoE layers and late steps of the balance term: 1 is even. Measured in every arm, inert or not."""
    load_balancing_coef: float | None
    """What the term was multiplied by; 0: inert."""
    training_flops: float
    """Of one run, from the experts that were active as measured, routers included."""
    tokens_per_second: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A finished comparison: its folder, its runs (the first router's first seed first), and a row a router."""

    path: Path
    runs: list[Path]
    pairing: Pairing
    rows: list[Row]


def compare(
    plan: Plan, *, root: Path = Path("runs"), devices: Sequence[str] = (), overwrite: bool = False, say: Say = print
) -> Comparison:
    """Train what is missing and compare; finished runs stay, interrupted ones go on (`overwrite`: all anew).

    `devices`: spread the runs over these, each run a process of its own; none: here, one after another.
    Writes comparison.json beside the runs.
    """
    planned = trials(plan)
    _check(plan, root)
    todo = _unfinished(planned, root, overwrite)
    pairing = check_pairing(planned, _prepare_data(planned[0].config))
    say(str(pairing))
    _train(todo, len(planned), _Place(root, devices, overwrite, say))
    if plan.equal == "flops":
        matched = at_equal_flops(planned, root)
        longer = [trial for trial, before in zip(matched, planned, strict=True) if trial is not before]
        say(f"equal FLOPs: {len(longer)} of {len(planned)} runs need another number of steps")
        _train(_unfinished(longer, root, overwrite), len(longer), _Place(root, devices, overwrite, say))
        planned = matched
    return _finish(plan, planned, pairing, root)


def _check(plan: Plan, root: Path) -> None:
    """Raise ConfigError where the plan compares nothing, or has no place."""
    from remoe.training.run import is_run

    if len(plan.routers) < 2:
        raise ConfigError(
            f"--routers names {plan.routers[0]} alone, must name at least two to compare; train one with `remoe train`"
        )
    for override in plan.overrides:
        if override.partition("=")[0].strip() in ("model.router", "model.router.name"):
            raise ConfigError(
                f"--set {override} is at odds with the routers that are compared ({', '.join(plan.routers)}): name it "
                "among them; options of a router belong in the config file, or in a recipe named among them"
            )
    if is_run(root / plan.name):
        raise ConfigError(f"{root / plan.name} is a run; choose another name for the comparison")


class _Place(NamedTuple):
    """Where and how runs are trained."""

    root: Path
    devices: Sequence[str]
    overwrite: bool
    say: Say


def _unfinished(planned: Sequence[Trial], root: Path, overwrite: bool) -> list[Trial]:
    return [trial for trial in planned if overwrite or not _is_done(trial, root)]


def _train(todo: Sequence[Trial], num_planned: int, place: _Place) -> None:
    if len(todo) < num_planned:
        place.say(f"{num_planned - len(todo)} of {num_planned} runs are finished and stay")
    for trial in todo:
        lock.check_free(place.root / trial.config.name)
    if place.devices:
        run_in_processes(todo, place.devices, place.root, overwrite=place.overwrite, say=place.say)
    else:
        _train_here(todo, place.root, overwrite=place.overwrite)


def _rows(outcomes: Iterable[dict[str, Any]]) -> list[Row]:
    """One row a router, from the results of its runs."""
    by_router: dict[str, list[dict[str, Any]]] = {}
    for outcome in outcomes:
        by_router.setdefault(outcome["router"], []).append(outcome)
    first = next(iter(by_router.values()))
    return [_row(own, first) for own in by_router.values()]


def _row(own: Sequence[dict[str, Any]], first: Sequence[dict[str, Any]]) -> Row:
    losses = [run["valid_loss"] for run in own]
    paired = [loss - other["valid_loss"] for loss, other in zip(losses, first, strict=True)]
    return Row(
        router=own[0]["router"],
        valid_loss=interval(losses),
        difference=None if own is first else interval(paired),
        active_experts=_mean(run["active_experts"] for run in own),
        load_balancing=_mean(run["load_balancing"] for run in own),
        load_balancing_coef=_mean(run["load_balancing_coef"] for run in own),
        training_flops=statistics.fmean(run["training_flops"] for run in own),
        tokens_per_second=_mean(run["tokens_per_second"] for run in own),
    )


def _balance(run: "Run", rows: Sequence[Metrics]) -> float | None:
    """The balance term of a late step, a layer."""
    value = late_mean(rows, "load_balancing")
    return None if value is None else value / run.config.model.num_moe_layers


def _prepare_data(config: "TrainConfig") -> int:
    """Read (and cache) the text once before any run, so that a mistake in it comes first; the tokenizer's size."""
    from remoe.data import open_corpus

    return open_corpus(config.data).tokenizer.vocab_size


def _is_done(trial: Trial, root: Path) -> bool:
    """Whether the run is there and finished; CheckpointError if it was trained with other settings."""
    from remoe.training import Run

    path = root / trial.config.name
    if not (path / "config.yaml").exists():
        return False
    run = Run.open(path)
    if not is_finished(run, run.step):
        return False
    changed = _settings_that_matter(run.config, trial.config)
    if changed:
        key, (before, after) = next(iter(changed.items()))
        raise CheckpointError(
            f"{path} was trained with {key} = {before}, not {after}; give the comparison another name, or --overwrite"
        )
    return True


def _settings_that_matter(before: "TrainConfig", after: "TrainConfig") -> dict[str, tuple[Any, Any]]:
    """Differing settings that decide a finished run's result; what only changes its speed or place does not."""
    from remoe.training.resume import CHANGEABLE

    changed = differences(to_dict(before), to_dict(after))
    if after.model.vocab_size is None:  # the tokenizer decides, and it is the same
        changed.pop("model.vocab_size", None)
    free = CHANGEABLE - {"train.steps"}
    return {key: values for key, values in changed.items() if key not in free and not key.startswith("parallel.")}


def _train_here(todo: Sequence[Trial], root: Path, *, overwrite: bool) -> None:
    from remoe.training import train
    from remoe.training.progress import terminal_reporter
    from remoe.training.signals import RunStoppedError

    for trial in todo:
        try:
            train(trial.config, resume=not overwrite, overwrite=overwrite, root=root, reporter=terminal_reporter())
        except RunStoppedError as error:
            error.args = (f"{trial.config.name} was stopped and saved; the same command (less --overwrite) goes on",)
            raise


def _finish(plan: Plan, planned: Sequence[Trial], pairing: Pairing, root: Path) -> Comparison:
    outcomes = {trial.config.name: _outcome(trial, root) for trial in planned}
    rows = _rows(outcomes.values())
    result = Comparison(
        path=root / plan.name, runs=[root / trial.config.name for trial in planned], pairing=pairing, rows=rows
    )
    values = {
        "config": plan.config,
        "overrides": list(plan.overrides),
        "seeds": list(plan.seeds),
        "equal": plan.equal,
        "pairing": pairing._asdict(),
        "differs": differing_settings(planned),
        "runs": outcomes,
        "rows": [row._asdict() | {"valid_loss": row.valid_loss._asdict(), "difference": _plain(row)} for row in rows],
    }
    (result.path / "comparison.json").write_text(json.dumps(finite(values), indent=1) + "\n", encoding="utf-8")
    return result


def _outcome(trial: Trial, root: Path) -> dict[str, Any]:
    from remoe.training import Run

    run = Run.open(root / trial.config.name)
    rows = run.metrics()
    return {
        "router": trial.router,
        "seed": trial.seed,
        "valid_loss": last_value(rows, "valid_loss", math.nan),
        "steps": rows[-1]["step"],
        "active_experts": late_mean(rows, "active_experts"),
        "valid_active_experts": rows[-1].get("valid_active_experts"),
        "load_balancing": _balance(run, rows),
        "load_balancing_coef": late_mean(rows, "load_balancing_coef"),
        "training_flops": training_flops(run),
        "tokens_per_second": median_speed(rows),
        "tokens": rows[-1]["tokens"],
    }


def _plain(row: Row) -> dict[str, float | None] | None:
    return row.difference._asdict() if row.difference else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
