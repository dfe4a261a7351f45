"""The averages of both papers' tables over the harness's results."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_NO_FILTER = "none"  # the harness names each value "metric,filter"


@dataclass(frozen=True)
class TaskGroup:
    """Tasks whose scores are averaged, each counting the same."""

    about: str
    metrics: dict[str, str]
    """The metric of each task that counts."""


GROUPS = {
    "remoe_seven": TaskGroup(
        "ReMoE's tables: zero-shot accuracy, seven tasks (its values look like raw accuracy)",
        dict.fromkeys(
            ("arc_challenge", "arc_easy", "boolq", "hellaswag", "lambada_openai", "piqa", "race"), "acc"
        ),
    ),
    "rmoe_five": TaskGroup(
        "RMoE's tables: zero-shot, five tasks (SciQ's metric is not stated there: accuracy)",
        {"arc_easy": "acc", "hellaswag": "acc_norm", "piqa": "acc_norm", "sciq": "acc", "lambada_openai": "acc"},
    ),
}  # fmt: skip


def tasks_of(names: Iterable[str]) -> list[str]:
    """The names with groups opened; each task once."""
    return list(dict.fromkeys(task for name in names for task in (GROUPS[name].metrics if name in GROUPS else [name])))


def add_averages(results: dict[str, Any]) -> None:
    """Add to the harness's results each group all of whose tasks were scored, in the harness's form for groups.

    The average and its standard error (tasks are independent) are under `average`, because a group may mix metrics.
    """
    for name, group in GROUPS.items():
        if all(task in results["results"] for task in group.metrics):
            results.setdefault("groups", {})[name] = _average(name, group, results["results"])
            results.setdefault("group_subtasks", {})[name] = list(group.metrics)
            results["configs"][name] = {"group": name, "about": group.about, "metrics": group.metrics}


def _average(name: str, group: TaskGroup, scores: dict[str, Any]) -> dict[str, Any]:
    values = [scores[task][f"{metric},{_NO_FILTER}"] for task, metric in group.metrics.items()]
    errors = [scores[task][f"{metric}_stderr,{_NO_FILTER}"] for task, metric in group.metrics.items()]
    is_known = all(isinstance(error, float) for error in errors)  # "N/A" for a single document
    return {
        "alias": name,
        "name": name,
        "sample_len": sum(scores[task]["sample_len"] for task in group.metrics),
        f"average,{_NO_FILTER}": sum(values) / len(values),
        f"average_stderr,{_NO_FILTER}": math.hypot(*errors) / len(errors) if is_known else "N/A",
    }
