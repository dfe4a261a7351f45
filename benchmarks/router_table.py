"""A router comparison from its raw logs, as a Markdown table: losses, paired differences, cost, starved layers.

Reads metrics.jsonl and config.yaml of folders named ROUTER-seedN, finished runs only. Example:

    python benchmarks/router_table.py results/wiki100 --prefix wiki100-k2- --against topk,relu
"""

import argparse
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from remoe.recipes.budget import training_flops
from remoe.recipes.intervals import interval
from remoe.training import Run
from remoe.training.metrics import Metrics, late_values


class Outcome(NamedTuple):
    """One run: validation loss (bits a byte, or nats a token), experts a token used there, and what it cost."""

    loss: float
    active_experts: float | None
    flops: float
    step_ms: float
    starved: float | None
    """Share of tokens without an expert in the layer with most of them, over the last quarter of the steps."""


Arms = dict[str, dict[int, Outcome]]


def arms_in(folder: Path, prefix: str = "", step: int | None = None) -> tuple[Arms, list[str]]:
    """Outcomes by router and seed, at a step or at the end, and a line about each run that did not get there."""
    found: Arms = {}
    left_out: list[str] = []
    for path in sorted(path.parent for path in folder.glob("*-seed*/metrics.jsonl")):
        run, rows = Run.open(path), Run.open(path).metrics()
        wanted = step or run.config.train.steps
        rows = [row for row in rows if row["step"] <= wanted]
        if rows and rows[-1]["step"] == wanted and "valid_loss" in rows[-1]:
            name, _, seed = path.name.rpartition("-seed")
            found.setdefault(name.removeprefix(prefix), {})[int(seed)] = outcome(run, rows)
        else:
            left_out.append(f"{path.name} has no validation at step {wanted}, left out")
    return found, left_out


def outcome(run: Run, rows: Sequence[Metrics]) -> Outcome:
    """What a run came to at the last of its rows."""
    in_bits = run.config.data.tokenizer == "bytes"
    return Outcome(
        loss=rows[-1]["valid_loss"] / (math.log(2) if in_bits else 1),
        active_experts=rows[-1].get("valid_active_experts"),
        flops=training_flops(run, rows[-1]["step"]),
        step_ms=1000 * statistics.median(late_values(rows, "step_seconds")),
        starved=worst_layer(rows),
    )


def worst_layer(rows: Sequence[Metrics]) -> float | None:
    """Largest mean over the late steps of a layer's share of tokens without an expert; None for a dense model."""
    layers = [values["no_expert"] for values in late_values(rows, "layers") if "no_expert" in values]
    return max(statistics.fmean(shares) for shares in zip(*layers, strict=True)) if layers else None


def paired(own: dict[int, Outcome], first: dict[int, Outcome]) -> str:
    """Mean of own - first over the seeds that both have, with its 95 % interval."""
    seeds = sorted(own.keys() & first.keys())
    if own is first or not seeds:
        return ""
    found = interval([own[seed].loss - first[seed].loss for seed in seeds])
    ends = "" if found.low is None else f" ({found.low:+.4f} to {found.high:+.4f})"
    return f"{found.mean:+.4f}{ends}{'' if seeds == sorted(first) else f', {len(seeds)} pairs'}"


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that were measured."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def line(name: str, arms: Arms, against: Sequence[str]) -> list[str]:
    """One line of the table."""
    runs = list(arms[name].values())
    plain = arms.get(against[0], arms[name])
    share = statistics.fmean(run.flops for run in runs) / statistics.fmean(run.flops for run in plain.values())
    experts, starved = mean(run.active_experts for run in runs), mean(run.starved for run in runs)
    return [
        name,
        str(len(runs)),
        f"{statistics.fmean(run.loss for run in runs):.4f}",
        *(paired(arms[name], arms.get(other, {})) for other in against),
        "–" if experts is None else f"{experts:.2f}",
        f"{share:.2f}",
        f"{statistics.fmean(run.step_ms for run in runs):.0f}",
        "–" if starved is None else f"{starved:.1%} (to {max(run.starved or 0 for run in runs):.1%})",
    ]


def table(arms: Arms, against: Sequence[str]) -> str:
    """Markdown, the lowest loss first; what the first of `against` computed is 1."""
    head = ["router", "seeds", "loss", *(f"minus {other} (95 %)" for other in against)]
    head += ["experts", f"FLOPs of {against[0]}'s", "ms a step", "tokens without an expert, worst layer (worst seed)"]
    order = sorted(arms, key=lambda name: statistics.fmean(run.loss for run in arms[name].values()))
    lines = [head, ["---"] * len(head), *(line(name, arms, against) for name in order)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prefix", default="", help="start of the routers' names that the table leaves out")
    parser.add_argument("--against", default="topk,relu", help="routers that the others are compared with")
    parser.add_argument("--step", type=int, help="a step with a validation; default: the last")
    arguments = parser.parse_args()
    arms, left_out = arms_in(arguments.folder, arguments.prefix, arguments.step)
    print(table(arms, arguments.against.split(",")))
    print("".join(f"\n{sentence}" for sentence in left_out), end="")


if __name__ == "__main__":
    main()
