"""`remoe eval`: how well a model predicts text it has not seen, per domain, or does on tasks of lm-eval."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from remoe.cli.options import THRESHOLD, AsJson, Device, RunPath, data_named, file_to_write, words
from remoe.errors import ConfigError

if TYPE_CHECKING:
    from remoe.data import DataConfig

DATA = "text to score, by default the run's own validation text; with --tasks: a folder of their jsonl files"
TASKS = "tasks of lm-evaluation-harness, or the groups remoe_seven and rmoe_five; comma-separated"
LENGTH = "tokens read at once; by default the run's, and for an export 256 (with --tasks: what it was trained with)"


def eval_command(
    path: RunPath,
    data: Annotated[str | None, Option(help=DATA)] = None,
    sequences: Annotated[int | None, Option(help="sequences to score; by default as many as the run's", min=1)] = None,
    sequence_length: Annotated[int | None, Option(help=LENGTH, min=2)] = None,
    tasks: Annotated[str | None, Option(help=TASKS)] = None,
    num_fewshot: Annotated[int | None, Option(help="examples to show; by default the task's", min=0)] = None,
    limit: Annotated[int | None, Option(help="documents of each task; by default all", min=1)] = None,
    threshold: Annotated[float | None, Option(help=THRESHOLD)] = None,
    output: Annotated[Path | None, Option(help="a file for the harness's own JSON", callback=file_to_write)] = None,
    batch_size: Annotated[int, Option(help="sequences of one forward pass", min=1)] = 16,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Loss, perplexity and bits per character on text, or with --tasks the scores of lm-evaluation-harness."""
    import contextlib
    import json
    import sys

    from remoe.cli.scores import task_table, text_table
    from remoe.training.memory import needed_for

    enough = needed_for(f"scoring {batch_size} sequences at once", "lower --batch-size or --sequence-length")
    if tasks is None:
        _refuse("needs --tasks", {"--num-fewshot": num_fewshot, "--limit": limit, "--output": output})
        if data is None:
            _refuse("needs --data or --tasks", {"--sequence-length": sequence_length})
        with enough, contextlib.redirect_stdout(sys.stderr):  # standard output is for the scores alone
            text = None if data is None else _held_out(path, data, sequence_length)
            options = {"num_sequences": sequences, "batch_size": batch_size, "device": device, "threshold": threshold}
            scores = _text_scores(path, text, options)
        print(json.dumps(scores.to_dict(), indent=1) if as_json else text_table(scores))
        return
    _refuse("is for text, must be left out with --tasks", {"--sequences": sequences})
    options = {"max_length": sequence_length, "num_fewshot": num_fewshot, "limit": limit, "threshold": threshold}
    with enough, contextlib.redirect_stdout(sys.stderr):
        results = _task_scores(path, words(tasks), data, options | {"batch_size": batch_size, "device": device})
    text = json.dumps(results, indent=2)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
    print(text if as_json else task_table(results))


def _refuse(why: str, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name} {why}")


def _task_scores(path: Path, tasks: list[str], data: str | None, options: dict[str, Any]) -> dict[str, Any]:
    from remoe.convert.model_type import is_converted
    from remoe.eval.harness import HarnessConfig, evaluate_tasks

    if is_converted(path):
        raise ConfigError(
            f"--tasks is for models of ours, {path} is one of transformers; use python -m remoe.eval.harness "
            f"--model hf --model_args pretrained={path},trust_remote_code=True"
        )
    return evaluate_tasks(path, tasks, data, HarnessConfig(**options))


def _text_scores(path: Path, text: "DataConfig | None", options: dict[str, Any]) -> Any:
    from contextlib import nullcontext

    from remoe.convert.either import load_either
    from remoe.eval import evaluate_checkpoint

    with data_named() if text else nullcontext():
        return evaluate_checkpoint(path, text, load=load_either, **options)


def _held_out(path: Path, data: str, sequence_length: int | None) -> "DataConfig":
    from remoe.eval.held_out import text_beside

    return text_beside(path, data, sequence_length)
