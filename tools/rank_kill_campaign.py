#!/usr/bin/env python3
"""Kill processes of runs under torchrun at random moments; compare every number with a run that was never stopped.

    python tools/rank_kill_campaign.py --kills 200 --output results/rank_kills.json

One run after the other, the layouts in turn. Each is killed (SIGKILL, one random rank) a few times: at a random step,
while it starts again after the kill before, or while it writes a checkpoint, as it happens. torchrun starts all ranks
again, with --resume. The exit code is 1 if a run does not end by itself, differs in a bit, or has lost a checkpoint.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from torchrun_workers import workers_of

TIMES = ("tokens_per_second", "step_seconds", "slowest_rank", "slowest_ratio")
STEPS, CHECKPOINT_INTERVAL = 60, 3
LAYOUTS: dict[str, list[str]] = {
    "shards": [],
    "copies": ["parallel.data_replicate=2"],
    "experts": ["parallel.expert=2"],
    "context": ["parallel.context=2"],
    "tensor": ["parallel.tensor=2"],
    "pipeline": ["parallel.pipeline=2"],
    "optimizer": ["parallel.sharded=optimizer"],
    "optimizer-experts": ["parallel.sharded=optimizer", "parallel.expert=2"],
}
SETTINGS = """
model: {hidden_size: 32, num_layers: 2, num_heads: 2, num_kv_heads: 2, intermediate_size: 32, num_experts: 4,
        init_std: 0.05, router: relu}
data: {sequence_length: 32}
optimizer: {warmup_steps: 4}
train: {batch_size: 8, validation_interval: 20, validation_batches: 1, flip_interval: 10, device: cpu}
parallel: {timeout: 30}
"""


def main() -> int:
    """Run the campaign; 0 if every run is identical to the unbroken one of its layout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kills-a-run", type=int, default=4)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = campaign(arguments, Path(folder))
    good = sum(row["identical"] for row in rows)
    kills = sum(len(row["kills"]) for row in rows)
    print(f"{kills} kills in {len(rows)} runs: {good} runs are identical, {len(rows) - good} are not")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({"seed": arguments.seed, "runs": rows}, indent=1) + "\n")
    return int(good < len(rows))


def campaign(arguments: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    """One row a run."""
    write_inputs(root)
    draw, expected, rows, left = random.Random(arguments.seed), {}, [], arguments.kills
    while left > 0:
        layout = arguments.layouts[len(rows) % len(arguments.layouts)]
        if layout not in expected:
            start(arguments, root, layout, f"whole-{layout}").wait(timeout=600)
            expected[layout] = numbers(root / f"whole-{layout}")
        row = killed_run(arguments, root, layout, f"run-{len(rows)}", min(left, arguments.kills_a_run), draw)
        row["identical"] = row["returncode"] == 0 and numbers(root / f"run-{len(rows)}") == expected[layout]
        left -= max(1, len(row["kills"]))
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def killed_run(
    arguments: argparse.Namespace, root: Path, layout: str, name: str, kills: int, draw: random.Random
) -> dict[str, Any]:  # fmt: skip
    """Start a run, kill one of its ranks now and then, and wait for its end."""
    began, done = time.monotonic(), []
    process = start(arguments, root, layout, name)
    metrics = root / name / "metrics.jsonl"
    for _ in range(kills):
        at_step = draw.randrange(STEPS)
        wait_for(process, metrics, at_step, draw.uniform(0, 0.5), draw.uniform(1, 20))
        ranks = ranks_of(process)
        if not ranks:
            break
        rank = draw.choice(sorted(ranks))
        saving = any((root / name / "checkpoints").glob("*.tmp"))
        os.kill(ranks[rank], signal.SIGKILL)
        done.append({"rank": rank, "after_lines": lines_of(metrics), "while_saving": saving})
        time.sleep(draw.uniform(0.2, 4))
    try:
        code: int | None = process.wait(timeout=600)
    except subprocess.TimeoutExpired:
        process.kill()
        code = None
    return {"layout": layout, "kills": done, "returncode": code, "seconds": round(time.monotonic() - began, 1)}


def ranks_of(process: subprocess.Popen[bytes]) -> dict[int, int]:
    """Rank to process id, once there are any; none where torchrun has ended."""
    while process.poll() is None:
        if ranks := workers_of(process):
            return ranks
        time.sleep(0.02)
    return {}


def wait_for(process: subprocess.Popen[bytes], metrics: Path, step: int, delay: float, longest: float) -> None:
    """Until a step is logged, and a little longer; no longer than that in all: some kills fall into a start."""
    deadline = time.monotonic() + longest
    while process.poll() is None and lines_of(metrics) < step and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(delay)


def start(arguments: argparse.Namespace, root: Path, layout: str, name: str) -> subprocess.Popen[bytes]:
    """torchrun with enough restarts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "50"]
    command += ["--nproc-per-node", str(arguments.processes), "-m", "remoe", "train", str(root / "config.yaml")]
    settings = [f"name={name}", f"train.steps={STEPS}", f"train.checkpoint_interval={CHECKPOINT_INTERVAL}"]
    command += ["--set", *settings, *LAYOUTS[layout], "--root", str(root), "--resume", "--no-report"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (root / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def lines_of(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def numbers(run: Path) -> list[dict[str, Any]]:
    """The lines of a run without the times; its last checkpoint must be there."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (run / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json").is_file(), f"{run} lost its last checkpoint"
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def write_inputs(root: Path) -> None:
    """A text and the config."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 7))) for _ in range(200)]
    text = "\n\n".join(" ".join(draw.choices(words, k=80)) for _ in range(60))
    (root / "text.txt").write_text(text, encoding="utf-8")
    settings = SETTINGS.replace("data: {", f"data: {{train: {root / 'text.txt'}, cache: {root / 'cache'}, ")
    (root / "config.yaml").write_text(settings)


if __name__ == "__main__":
    sys.exit(main())
