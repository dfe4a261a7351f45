"""Log-likelihoods of the harness's requests: our scoring beside its own HFLM, on the same weights.

Both get the same token requests and take turns in one process, task by task; HFLM runs the transformers class around
the same tensors. On a CPU each has one thread and its CPU time counts, so that other work on the machine does not; on
a GPU the wall clock. Exits with 1 where an answer differs by more than 1e-4, or where ours is slower. Example:

    remoe train demo-relu --set name=scored && \\
        python benchmarks/loglikelihood.py runs/scored --data evals --limit 50 --output results/loglikelihood_cpu.json
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from remoe.bench.results import MismatchError, Results
from remoe.cli.table import table
from remoe.errors import RemoeError
from remoe.eval.harness import write_tasks
from remoe.eval.harness.evaluate import stay_offline
from remoe.eval.harness.groups import tasks_of

TOLERANCE = 1e-4
TASKS = "arc_easy,arc_challenge,boolq,hellaswag,lambada_openai,piqa,sciq"


class Arm(NamedTuple):
    """What one side made of a task's requests."""

    answers: list[tuple[float, bool]]
    seconds: list[float]


def requests_of(names: Sequence[str], data: Path, limit: int | None) -> dict[str, list[Any]]:
    """The harness's requests of each task."""
    from lm_eval.tasks import TaskManager

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(names, data, Path(folder))
        tasks = TaskManager(include_path=folder, include_defaults=False).load(list(names))["tasks"]
        for name, task in tasks.items():
            task.set_config("num_fewshot", 0)
            task.build_all_requests(limit=limit)
            found[name] = task.instances
    return found


def tokenised(model: Any, requests: Sequence[Any]) -> list[Any]:
    """What the harness hands a model once it has tokenised the requests."""
    kept: list[Any] = []
    score = model._loglikelihood_tokens
    model._loglikelihood_tokens = lambda pairs, **_: kept.extend(pairs)
    model.loglikelihood(requests, disable_tqdm=True)
    model._loglikelihood_tokens = score
    return kept


def as_hflm(ours: Any, batch_size: int) -> Any:
    """HFLM around the same tensors. It wants a tokenizer but is given tokens: any will do."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from remoe.hf.native import from_native

    words = Tokenizer(WordLevel({"<eod>": 0}, unk_token="<eod>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eod>", pad_token="<eod>")
    return HFLM(
        from_native(ours.model).eval(), tokenizer=tokenizer, batch_size=batch_size, max_length=ours.max_length,
        device=str(ours.device),
    )  # fmt: skip


def measure(arms: dict[str, Any], requests: Sequence[Any], repeats: int) -> dict[str, Arm]:
    """Answers and seconds of each side, in turn, after one turn that does not count."""
    found = {name: Arm([], []) for name in arms}
    clock = time.perf_counter if arms["ours"].device.type == "cuda" else time.process_time
    for turn in range(repeats + 1):
        for name, model in arms.items():
            start = clock()
            answers = model._loglikelihood_tokens(requests, disable_tqdm=True)
            if turn:
                found[name].seconds.append(clock() - start)
            found[name].answers[:] = answers
    return found


def row_of(task: str, requests: Sequence[Any], found: dict[str, Arm]) -> dict[str, Any]:
    """One line of the results."""
    ours, hflm = found["ours"], found["hflm"]
    difference = max(abs(a[0] - b[0]) for a, b in zip(ours.answers, hflm.answers, strict=True))
    return {
        "task": task,
        "requests": len(requests),
        "tokens": sum(len(context) + len(continuation) for _, context, continuation in requests),
        "ours_requests_per_second": len(requests) / statistics.median(ours.seconds),
        "hflm_requests_per_second": len(requests) / statistics.median(hflm.seconds),
        "speedup": statistics.median(b / a for a, b in zip(ours.seconds, hflm.seconds, strict=True)),
        "largest_difference": difference,
        "mismatches": [f"{task}: {difference:.1e}"] if difference > TOLERANCE else [],
    }


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The results as a table."""
    header = ("task", "requests", "tokens", "ours/s", "HFLM/s", "speed-up", "largest difference")
    lines = [
        (
            row["task"], f"{row['requests']:,}", f"{row['tokens']:,}", f"{row['ours_requests_per_second']:.1f}",
            f"{row['hflm_requests_per_second']:.1f}", f"{row['speedup']:.2f}", f"{row['largest_difference']:.1e}",
        )
        for row in rows
    ]  # fmt: skip
    return table(header, lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run, a checkpoint or an export")
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' jsonl files")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, help="documents of each task; default all")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, help="default: the run's sequence length")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    stay_offline()
    torch.set_num_threads(1)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of each context that it cuts
    from remoe.eval.harness.model import RemoeLM

    ours = RemoeLM(
        options.run, device=options.device, batch_size=options.batch_size, max_length=options.max_length,
        precision="fp32",
    )  # fmt: skip
    arms = {"ours": ours, "hflm": as_hflm(ours, options.batch_size)}
    about = {"batch_size": options.batch_size, **ours.get_model_info(), "device": str(ours.device)}
    results = Results("loglikelihood", options.output, **about)
    for task, requests in requests_of(tasks_of(options.tasks.split(",")), options.data, options.limit).items():
        tokens = tokenised(ours, requests)
        with torch.no_grad():
            results.add(row_of(task, tokens, measure(arms, tokens, options.repeats)))
    print(show(results.rows))
    results.check()
    slower = [row["task"] for row in results.rows if row["speedup"] < 1]
    if slower:
        raise MismatchError(f"slower than HFLM: {', '.join(slower)}")


if __name__ == "__main__":
    try:
        main()
    except RemoeError as error:
        print(f"loglikelihood: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
