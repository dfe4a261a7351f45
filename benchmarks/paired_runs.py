"""Validation losses of runs named ROUTER-seedN at one step: means, paired differences, 95 % intervals, settling.

Reads metrics.jsonl alone, so it works on the runs kept under results/. Example:

    python benchmarks/paired_runs.py results/pile6 --step 400 --first relu
"""

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path

from remoe.analysis.examine import examine
from remoe.analysis.figures import stages
from remoe.recipes.intervals import interval
from remoe.training import Run

Losses = dict[str, dict[str, float]]


def losses_at(folder: Path, step: int) -> Losses:
    """Validation loss at a step, by router and seed."""
    found: Losses = {}
    for path in sorted(folder.glob("*-seed*")):
        router, _, seed = path.name.rpartition("-seed")
        values = [row["valid_loss"] for row in Run.open(path).metrics() if row["step"] == step and "valid_loss" in row]
        if values:
            found.setdefault(router, {})[seed] = values[0]
    return found


def paired(first: Mapping[str, float], other: Mapping[str, float]) -> str:
    """Mean of other - first over the seeds that both have, with its interval."""
    seeds = sorted(first.keys() & other.keys())
    if len(seeds) < 2:
        return f"{len(seeds)} pair(s): no interval"
    found = interval([other[seed] - first[seed] for seed in seeds])
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f}, {len(seeds)} pairs)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--first", default="relu", help="the router that the others are compared with")
    arguments = parser.parse_args()
    losses = losses_at(arguments.folder, arguments.step)
    print(f"validation loss after step {arguments.step}")
    for router, by_seed in losses.items():
        values = "  ".join(f"seed {seed}: {loss:.4f}" for seed, loss in sorted(by_seed.items()))
        difference = "" if router == arguments.first else f"  minus {arguments.first}: "
        difference += "" if router == arguments.first else paired(losses[arguments.first], by_seed)
        print(f"{router:6} mean {statistics.fmean(by_seed.values()):.4f}  {values}{difference}")
    records = [examine(path, {}) for path in sorted(arguments.folder.glob(f"{arguments.first}-seed*"))]
    for found in stages.numbers(records):
        print(stages.settled(found), f"Stage I ended at step {found.stage_1_end}.")


if __name__ == "__main__":
    main()
