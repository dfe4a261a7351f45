#!/usr/bin/env python3
"""Kill training runs at random moments, resume them, and compare every number with a run that was never stopped.

    python tools/kill_campaign.py --points 20

Each point is a run of its own: started, killed with SIGKILL at a random moment of a random step (step 0: while it
starts; some moments fall into the writing of a checkpoint), then resumed to its end. Prints a table; the exit code is 1
if any continuation differs in any bit.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same bits need the same number of threads

TIMES = ("tokens_per_second", "step_seconds")
SETTINGS: dict[str, Any] = {
    "model": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "intermediate_size": 32,
        "num_experts": 4,
        "init_std": 0.05,
    },
    "data": {"sequence_length": 32},
    "optimizer": {"warmup_steps": 4},
    "train": {
        "batch_size": 8,
        "micro_batch_size": 4,
        "validation_interval": 6,
        "validation_batches": 1,
        "checkpoint_interval": 3,
        "flip_interval": 4,
        "device": "cpu",
    },
}


class Moment(NamedTuple):
    """When to kill: so many seconds after a step was logged, or after the start for step 0."""

    step: int
    delay: float


class Outcome(NamedTuple):
    """One kill and what became of the run."""

    seconds: float
    logged_step: int
    checkpoint_step: int
    was_saving: bool
    is_identical: bool


def main() -> int:
    """Run the campaign; 0 if every continuation is identical."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=20, help="how many runs to kill")
    parser.add_argument("--steps", type=int, default=120, help="steps of each run")
    parser.add_argument("--router", default="relu", help="router of the model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["remoe.training.loop", "torch.distributed.checkpoint"])
    with tempfile.TemporaryDirectory() as folder:
        return campaign(context, arguments, Path(folder))


def campaign(context: ForkServerContext, arguments: argparse.Namespace, root: Path) -> int:
    """Make the unbroken run, then the broken ones, and print the table."""
    settings = settings_for(arguments, root)
    train_in_process(context, settings | {"name": "warm-up"}, root)  # tokenises the text, starts the fork server
    started = time.perf_counter()
    train_in_process(context, settings | {"name": "whole"}, root)
    duration = time.perf_counter() - started
    expected = numbers(root / "whole")
    print(f"an unbroken run of {arguments.steps} steps takes {duration:.2f} s; killing {arguments.points} runs\n")
    print(
        f"{'point':>5} {'killed after':>13} {'logged step':>12} {'checkpoint':>11} {'while saving':>13}  continuation"
    )
    draw, failures = random.Random(arguments.seed), 0
    for point in range(1, arguments.points + 1):
        moment = Moment(draw.randrange(arguments.steps - 2), draw.uniform(0, 2 * duration / arguments.steps))
        outcome = kill_and_resume(context, settings | {"name": f"point-{point}"}, root, moment, expected)
        print(format_row(point, outcome), flush=True)
        failures += not outcome.is_identical
    print(f"\n{arguments.points - failures} of {arguments.points} continuations are identical")
    return 1 if failures else 0


def settings_for(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Settings of every run, on a text written here."""
    text = root / "text.txt"
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 7))) for _ in range(200)]
    text.write_text("\n\n".join(" ".join(draw.choices(words, k=80)) for _ in range(60)), encoding="utf-8")
    model = SETTINGS["model"] | {"router": arguments.router}
    data = SETTINGS["data"] | {"train": str(text), "cache": str(root / "cache")}
    return SETTINGS | {"model": model, "data": data, "train": SETTINGS["train"] | {"steps": arguments.steps}}


def train_child(settings: dict[str, Any], root: Path) -> None:
    """What a child process does."""
    from remoe.config import from_dict
    from remoe.training import TrainConfig, train

    train(from_dict(TrainConfig, settings), resume=True, root=root)


def train_in_process(context: ForkServerContext, settings: dict[str, Any], root: Path) -> None:
    """Train to the end in a child process."""
    process = context.Process(target=train_child, args=(settings, root))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"run {settings['name']} failed with exit code {process.exitcode}")


def wait_for(metrics: Path, step: int) -> None:
    """Return once the step is logged."""
    while step and (not metrics.exists() or metrics.read_bytes().count(b"\n") < step):
        time.sleep(0.001)


def kill_and_resume(
    context: ForkServerContext, settings: dict[str, Any], root: Path, moment: Moment, expected: list[dict[str, Any]]
) -> Outcome:
    """Start a run, kill it at a moment, resume it, and compare."""
    process = context.Process(target=train_child, args=(settings, root))
    started = time.perf_counter()
    process.start()
    wait_for(root / settings["name"] / "metrics.jsonl", moment.step)
    time.sleep(moment.delay)
    process.kill()
    process.join()
    seconds = time.perf_counter() - started
    if process.exitcode != -signal.SIGKILL:
        raise SystemExit(f"run {settings['name']} ended with {process.exitcode} before it could be killed")
    run = root / settings["name"]
    checkpoints = [path.name for path in run.glob("checkpoints/step_*")]
    finished = [int(name.removeprefix("step_")) for name in checkpoints if not name.endswith(".tmp")]
    logged = [line["step"] for line in numbers(run)]
    train_in_process(context, settings, root)
    return Outcome(
        seconds,
        max(logged, default=0),
        max(finished, default=0),
        any(name.endswith(".tmp") for name in checkpoints),
        numbers(run) == expected,
    )


def numbers(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics that are complete, without times; JSON keeps every bit of a float."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"
    ]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def format_row(point: int, outcome: Outcome) -> str:
    """One line of the table."""
    return (
        f"{point:>5} {outcome.seconds:>11.3f} s {outcome.logged_step:>12} {outcome.checkpoint_step:>11} "
        f"{'yes' if outcome.was_saving else 'no':>13}  {'identical' if outcome.is_identical else 'DIFFERS'}"
    )


if __name__ == "__main__":
    sys.exit(main())
