"""The harness's own JSON of several models as one Markdown table: scores and standard errors, task by task.

remoe eval RUN --tasks arc_easy,piqa --data evals --output relu.json
python benchmarks/task_table.py relu.json topk.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

METRICS = {"acc": "accuracy", "acc_norm": "normalised accuracy", "perplexity": "perplexity", "average": "average"}


def scores_of(results: dict[str, Any]) -> dict[tuple[str, str, int], str]:
    """Value and standard error by task, metric and number of items; groups last."""
    found = {}
    for name, scores in [*results["results"].items(), *results.get("groups", {}).items()]:
        for metric, words in METRICS.items():
            if f"{metric},none" in scores:
                form = ",.0f" if metric == "perplexity" else ".4f"
                value, error = scores[f"{metric},none"], scores[f"{metric}_stderr,none"]
                spread = f"{error:{form}}" if isinstance(error, float) else error  # "N/A" where the harness has none
                found[name, words, scores["sample_len"]] = f"{value:{form}} ± {spread}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="what `remoe eval --tasks … --output FILE` wrote")
    files = parser.parse_args().results
    models = {path.stem: scores_of(json.loads(path.read_text(encoding="utf-8"))) for path in files}
    print("| task | metric | items | " + " | ".join(models) + " |")
    print("|---|---|---|" + "---|" * len(models))
    rows = dict.fromkeys(row for scores in models.values() for row in scores)
    for task, metric, items in rows:
        cells = [scores.get((task, metric, items), "") for scores in models.values()]
        print(f"| {task} | {metric} | {items:,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
