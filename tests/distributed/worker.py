"""One process of several: `torchrun --nproc-per-node N worker.py OUTPUT CASE…` writes what each case returned.

A case returns plain values on every rank; OUTPUT holds a list of them, rank by rank.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from remoe.distributed import launch
from remoe.distributed.world import rank, world_size

sys.path.insert(0, str(Path(__file__).parent))
import cases_checkpoint
import cases_exchange
import cases_known_rows
import cases_numbers
import cases_pace
import cases_pipeline
import cases_ranks

CASES: dict[str, Callable[[], Any]] = {
    **cases_checkpoint.CASES,
    **cases_exchange.CASES,
    **cases_known_rows.CASES,
    **cases_numbers.CASES,
    **cases_pipeline.CASES,
    **cases_pace.CASES,
    **cases_ranks.CASES,
}


def main() -> None:
    """Run the cases in turn."""
    output, names = Path(sys.argv[1]), sys.argv[2:]
    torch.manual_seed(0)
    device = launch.local_device(torch.device(os.environ.get("DEVICE", "cpu")))
    with launch.process_group(device, timeout_seconds=30):
        results = {}
        for name in names:
            results[name] = everyone = [CASES[name]()]
            if world_size() > 1:
                everyone *= world_size()
                dist.all_gather_object(everyone, everyone[0])
    if rank() == 0:
        output.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
