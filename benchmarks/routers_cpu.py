"""One training step of the demo's model with each router on the CPU, in steady state, beside Top-K's.

All models step in turn in one process, on the same batches, so that the ratios hold when the machine's speed drifts.
Each takes some steps first on the demo's text, ReLU ones from a larger coefficient, until their sparsity is near the
target; the table shows how many experts a token then used. Example:

    python benchmarks/routers_cpu.py --output results/routers_cpu.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from remoe.bench import machine
from remoe.config import from_dict
from remoe.data import Sampler, open_corpus
from remoe.model import ReMoEForCausalLM
from remoe.moe.routers import ROUTERS
from remoe.recipes import load
from remoe.training.config import TrainConfig
from remoe.training.step import Stepper

TOKEN_CHOICE, RECURRENT = 1.2, 1.4
VOCABULARY = 257
COEFFICIENT = 1e-2


def stepper_of(router: str) -> Stepper:
    """The demo's model and optimizer with another router."""
    values = load("demo-relu")
    values["model"] |= {"router": router, "vocab_size": VOCABULARY}
    values["sparsity"] = values.get("sparsity", {}) | {"init": COEFFICIENT}
    config = from_dict(TrainConfig, values)
    return Stepper(config, ReMoEForCausalLM(config.model), torch.device("cpu"))


def measure(steppers: dict[str, Stepper], warm_up: int, repeats: int) -> tuple[dict, dict]:
    """Milliseconds of each counted step, and active experts per token over them, by router."""
    times: dict[str, list[float]] = {name: [] for name in steppers}
    active: dict[str, list[float]] = {name: [] for name in steppers}
    config = next(iter(steppers.values())).config
    text = open_corpus(config.data).train
    sampler = Sampler(text, config.data.sequence_length, config.train.batch_size, config.seed)
    for step in range(1, warm_up + repeats + 1):
        batch = sampler.batch(step - 1)
        for name, stepper in steppers.items():
            start = time.perf_counter()
            values = stepper.run(batch, step)
            if step > warm_up:
                times[name].append((time.perf_counter() - start) * 1e3)
                active[name].append(float(values["active"].sum() / values["tokens"].sum()))
    return times, active


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routers", default=",".join(ROUTERS))
    parser.add_argument("--warm-up", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = dict.fromkeys(("topk", *arguments.routers.split(",")))
    times, active = measure({name: stepper_of(name) for name in names}, arguments.warm_up, arguments.repeats)
    print(f"{'router':16} {'median ms':>10} {'of Top-K':>9} {'experts/token':>14}")
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, times["topk"], strict=True))
        most = RECURRENT if name in ("rmoe", "recurrent_relu") else TOKEN_CHOICE
        verdict = "reached" if ratio <= most else f"MISSED (most {most})"
        mean_active = statistics.fmean(active[name])
        print(f"{name:16} {statistics.median(values):10.1f} {ratio:9.3f} {mean_active:14.2f}  {verdict}")
    if arguments.output:
        rounded = {name: [round(value, 3) for value in values] for name, values in times.items()}
        found = {**machine.describe(), "milliseconds": rounded, "active_experts": active}
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
