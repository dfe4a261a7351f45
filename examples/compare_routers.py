"""Compare two routers over seeds from Python: the same batches, the same initial values of all that they share.

python examples/compare_routers.py [KEY=VALUE ...], for example data.train=corpus.txt train.steps=500
"""

import sys

from remoe.analysis import write_report
from remoe.recipes.comparison import compare
from remoe.recipes.plan import Plan


def main(*overrides: str) -> None:
    """Train what is not yet trained below runs/, print paired differences, and write one report."""
    plan = Plan(name="two-routers", config="demo-relu", routers=("topk", "relu"), seeds=(0, 1, 2), overrides=overrides)
    result = compare(plan)
    for row in result.rows:
        print(f"{row.router}: validation loss {row.valid_loss.mean:.4f}, {row.active_experts:.2f} experts a token")
        if row.difference is not None:
            low, high = row.difference.low, row.difference.high
            print(f"  minus {plan.routers[0]}: {row.difference.mean:+.4f} (95 %: {low:+.4f} to {high:+.4f})")
    print(f"report: {write_report(result.runs, result.path / 'report.html')}")


if __name__ == "__main__":
    main(*sys.argv[1:])
