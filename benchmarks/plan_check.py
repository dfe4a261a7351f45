"""Compare `remoe plan`'s predictions with every measured step under results/: speed and memory of one GPU and of many.

    python benchmarks/plan_check.py [--output results/plan_check.json]

The exit code is 1 where a prediction is further off than the limit. A row whose model the constants were fitted to says
so: it shows that the formulas can hold, not that they foretell.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from measured import MeasuredStep, measured_layouts, measured_models
from remoe.cli.table import table
from remoe.distributed.planning import machine

RESULTS = Path(__file__).resolve().parents[1] / "results"
LIMIT = 0.15


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = [compared(row, is_fitted=row.is_for_fit) for row in measured_models(options.results)]
    rows += [compared(row, is_fitted=False) for row in measured_layouts(options.results)]
    foretold = [row for row in rows if not row["fitted"]]
    print(text(rows) if rows else f"no measured step under {options.results}")
    far = [row for row in rows if row["same_gpu"] and is_far(row)]
    print(f"{len(rows)} measured steps, {len(foretold)} of layouts that no constant is fitted to")
    print(f"{len(far)} further off than {LIMIT:.0%}; rows of other cards than the {machine().name} do not count")
    if options.output is not None:
        options.output.write_text(json.dumps({"limit": LIMIT, "rows": rows}, indent=1) + "\n")
    return int(bool(far))


def is_far(row: dict[str, Any]) -> bool:
    return max(abs(row["speed_error"]), abs(row["memory_error"])) > LIMIT


def compared(row: MeasuredStep, is_fitted: bool) -> dict[str, Any]:
    """Predicted and measured; errors relative to what was measured."""
    predicted = row.predicted()
    memory = predicted.memory.total_at_start if row.at_start else predicted.memory.total
    seconds = predicted.start_step_seconds if row.at_start else predicted.step_seconds
    speed = row.job.tokens / seconds.total
    return {
        "source": row.source,
        "what": row.what,
        "gpu": row.gpu,
        "same_gpu": row.gpu == machine().name,
        "fitted": is_fitted,
        "predicted_tokens_per_second": speed,
        "tokens_per_second": row.tokens_per_second,
        "speed_error": speed / row.tokens_per_second - 1,
        "predicted_peak_bytes": memory,
        "peak_bytes": row.peak_bytes,
        "memory_error": memory / row.peak_bytes - 1,
    }


def text(rows: list[dict[str, Any]]) -> str:
    head = ("source", "what", "card", "tokens/s", "measured", "off", "GiB", "measured", "off")
    return table(head, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    speeds = (row["predicted_tokens_per_second"], row["tokens_per_second"])
    sizes = (row["predicted_peak_bytes"], row["peak_bytes"])
    return (
        row["source"],
        row["what"] + (" (fitted)" if row["fitted"] else ""),
        row["gpu"],
        *(f"{speed:,.0f}" for speed in speeds),
        f"{row['speed_error']:+.0%}",
        *(f"{size / 2**30:.1f}" for size in sizes),
        f"{row['memory_error']:+.0%}",
    )


if __name__ == "__main__":
    sys.exit(main())
