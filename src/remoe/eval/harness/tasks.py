"""The harness's own tasks over local jsonl files: one generated YAML a task, which changes nothing but the data."""

import importlib.util
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remoe.errors import ConfigError, DataError, MissingExtraError, one_of
from remoe.eval.harness.groups import GROUPS

SPLIT_KEYS = {"train": "training_split", "validation": "validation_split", "test": "test_split"}


@dataclass(frozen=True)
class LocalTask:
    """A task of the harness that can read local files."""

    source: str
    """Its YAML below lm_eval/tasks."""
    splits: tuple[str, ...]
    """The splits that it has; the harness scores the last one."""
    fields: tuple[str, ...]
    """Keys that its prompts need, dotted."""


_CHOICES = ("choices.text", "choices.label", "answerKey")
_TRAIN_AND_VALIDATION = ("train", "validation")
TASKS = {
    "arc_challenge": LocalTask("arc/arc_challenge.yaml", tuple(SPLIT_KEYS), ("question", *_CHOICES)),
    "arc_easy": LocalTask("arc/arc_easy.yaml", tuple(SPLIT_KEYS), ("question", *_CHOICES)),
    "boolq": LocalTask("super_glue/boolq/default.yaml", _TRAIN_AND_VALIDATION, ("question", "passage", "label")),
    "hellaswag": LocalTask(
        "hellaswag/hellaswag.yaml", _TRAIN_AND_VALIDATION, ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    ),
    "lambada_openai": LocalTask("lambada/lambada_openai.yaml", ("test",), ("text",)),
    "openbookqa": LocalTask("openbookqa/openbookqa.yaml", tuple(SPLIT_KEYS), ("question_stem", *_CHOICES)),
    "piqa": LocalTask("piqa/piqa.yaml", _TRAIN_AND_VALIDATION, ("goal", "sol1", "sol2", "label")),
    "race": LocalTask("race/race.yaml", ("test",), ("article", "problems")),
    "sciq": LocalTask(
        "sciq/sciq.yaml",
        tuple(SPLIT_KEYS),
        ("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer"),
    ),
    "winogrande": LocalTask(
        "winogrande/default.yaml", _TRAIN_AND_VALIDATION, ("sentence", "option1", "option2", "answer")
    ),
}  # fmt: skip


def write_tasks(names: Iterable[str], data: Path, folder: Path, num_fewshot: int = 0) -> None:
    """Write a YAML for each task into `folder`, over the files of `data`: TASK_SPLIT.jsonl, or TASK.jsonl.

    TASK.jsonl is the split that the harness scores. Where that is missing another one is scored, never the training
    split. Examples to show (`num_fewshot`) come from the other splits, by the harness's rule. Raises ConfigError for a
    task that is not in TASKS, and DataError for a file that is missing or has another form.
    """
    if not data.is_dir():
        raise DataError(f"--data is {data}, must be a folder with a jsonl file a task, such as arc_easy_test.jsonl")
    for name in names:
        if name not in TASKS:
            raise ConfigError(
                f"--tasks names {name!r}, which cannot be read from local files; with --data it "
                f"{one_of(name, [*TASKS, *GROUPS])}"
            )
        files = _files(name, data)
        _check_scored(name, files, data)
        if num_fewshot and len(files) == 1:
            raise _no_examples(name, data)
        for path in files.values():
            check_rows(path, TASKS[name].fields)
        text = json.dumps(_config(name, files, folder), indent=1)  # JSON is YAML
        (folder / f"{name}.yaml").write_text(text + "\n", encoding="utf-8")


def check_rows(path: Path, fields: Sequence[str]) -> None:
    """Raise DataError unless each line is a JSON object with these keys."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not valid JSON ({error})") from None
            missing = next((field for field in fields if not _has(row, field)), None)
            if missing is not None:
                raise DataError(f"{path}:{number}: has no key {missing!r}, must have {', '.join(fields)}")


def _has(row: Any, field: str) -> bool:
    for key in field.split("."):
        if not isinstance(row, dict) or key not in row:
            return False
        row = row[key]
    return True


def _files(name: str, data: Path) -> dict[str, Path]:
    """The file of each split that is there; sub-folders count."""
    splits = TASKS[name].splits
    found = {split: _only(data, f"{name}_{split}.jsonl") for split in splits}
    found[splits[-1]] = found[splits[-1]] or _only(data, f"{name}.jsonl")
    return {split: path for split, path in found.items() if path is not None}


def _only(data: Path, file_name: str) -> Path | None:
    paths = sorted(data.rglob(file_name))
    if len(paths) > 1:
        raise DataError(f"{data} holds {file_name} twice: {paths[0]} and {paths[1]}; remove one")
    return paths[0].absolute() if paths else None


def _check_scored(name: str, files: dict[str, Path], data: Path) -> None:
    wanted = [split for split in reversed(TASKS[name].splits) if split != "train"]
    if not any(split in files for split in wanted):
        names = " or ".join(f"{name}_{split}.jsonl" for split in wanted)
        raise DataError(f"{data} has no file for task {name}, must hold {names}; or leave the task out of --tasks")


def _no_examples(name: str, data: Path) -> DataError:
    others = [f"{name}_{split}.jsonl" for split in TASKS[name].splits[:-1]]
    fix = f"add {' or '.join(others)}, or leave out --num-fewshot" if others else "leave out --num-fewshot"
    return DataError(f"{name} has no examples to show: {data} holds only the questions to answer; {fix}")


def _config(name: str, files: dict[str, Path], folder: Path) -> dict[str, Any]:
    return {
        "include": str(harness_folder() / "tasks" / TASKS[name].source),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,  # else the hub's name goes to the json reader
        "dataset_kwargs": {
            "data_files": {split: str(path) for split, path in files.items()},
            "cache_dir": str(folder.absolute() / "cache"),
        },
        **{key: split if split in files else None for split, key in SPLIT_KEYS.items()},
        "fewshot_split": None,
    }


def harness_folder() -> Path:
    """Where lm_eval is installed; MissingExtraError where it is not."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise MissingExtraError("lm_eval", "eval")
    return Path(spec.origin).parent
