"""What Stages I and II of ReLU routing add to a run of 60k steps: measured speeds, over the densities of recorded runs.

    python benchmarks/stages.py results/gpu/model_*.json [--runs results] [--output results/gpu/stages.json]

A step's time is taken as linear in the experts that are on, through two that `remoe bench model` measured: the dense
start's and the steady state's. A recorded run (a folder with config.yaml and metrics.jsonl) gives the experts that were
on at each step until its sparsity first reached its target: so many steps like the dense start are what they add up to.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from remoe.analysis.figures.stages import boundaries
from remoe.analysis.metrics import Metrics
from remoe.bench.model import STAGE_STEPS, extra_time
from remoe.cli.failures import exit_code_of
from remoe.errors import ConfigError
from remoe.training import Run

_KEYS = ("step", "sparsity", "sparsity_coef", "sparsity_l1", "lm_loss")


def main() -> None:
    """Print them, and write them where wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="what `remoe bench model --json FILE` wrote")
    parser.add_argument("--runs", type=Path, default=Path("results"), help="where recorded runs lie, in any folder")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    text = json.dumps(stages(options.models, options.runs), indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")


def stages(models: Iterable[Path], folder: Path) -> dict[str, Any]:
    """Recorded runs, and what their Stages I and II would add to a run of each model."""
    runs = list(stages_of_runs(folder))
    if not runs:
        raise ConfigError(f"no run of the ReLU router under {folder} logged each step until its target; give --runs")
    return {"runs": runs, "rows": extra_times(models, runs)}


def stages_of_runs(folder: Path) -> Iterator[dict[str, Any]]:
    """Each run's steps of Stages I and II, as how many of half of all experts they count above the steady state, and
    the most experts that were on, of all steps and from the 50th. Runs that did not log each step are left out.
    """
    for path in sorted(path.parent for path in folder.rglob("metrics.jsonl")):
        run = Run.open(path)
        moe = run.config.model.moe
        steps, sparsity, coef, l1, lm_loss = Metrics(run.metrics()).series(*_KEYS)
        if moe.router_name != "relu" or not len(steps) or len(steps) != steps[-1]:
            continue
        density = moe.routed_top_k / moe.routed_experts
        _, on_target = boundaries(steps, sparsity, coef * l1, lm_loss, 1 - density)
        if on_target is not None:
            above = 1 - sparsity - density
            yield {
                "run": str(path.relative_to(folder)),
                "steps": on_target - 1,
                "dense_steps": round(float(above[: on_target - 1].sum()) / (0.5 - density), 1),
                "most_experts": round(moe.routed_experts * (density + float(above.max())), 1),
                "most_experts_from_50": round(moe.routed_experts * (density + float(above[49:].max(initial=0))), 1),
            }


def extra_times(paths: Iterable[Path], runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What Stages I and II add to a run of each model by each count of steps. Its two phases may be in two files; of a
    phase that is in several the last counts.
    """
    rows = [row for path in paths for row in _rows(path)]
    steps = {(row["model"], row["phase"]): row["step_ms"] for row in rows if row.get("candidate") == "relu"}
    dense_steps = [run["dense_steps"] for run in runs]
    found = []
    for (model, phase), steady in steps.items():
        if phase == "steady" and (model, "start") in steps:
            start_step = steps[model, "start"] / steady
            counts = {"paper": STAGE_STEPS, "runs_least": min(dense_steps), "runs_most": max(dense_steps)}
            extra = {name: extra_time(start_step, count) for name, count in counts.items()}
            found.append({"model": model, "start_step": start_step, **extra})
    if not found:
        raise ConfigError("no model has both phases, start and steady, of the ReLU router; give all its files")
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["benchmark"] == "model":
            return content["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{path} is not what `remoe bench model --json FILE` writes")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
