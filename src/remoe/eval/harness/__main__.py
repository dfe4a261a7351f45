"""The harness's own command line, which knows our models and, with --data DIR, local files as its tasks.

    python -m remoe.eval.harness --model remoe --model_args pretrained=runs/NAME --tasks arc_easy --data DIR

All else is lm_eval's: few-shot examples, chat templates, logged samples, response caches, other models.
"""

# pyright: reportMissingImports=false

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from remoe.errors import MissingExtraError, RemoeError
from remoe.eval.harness.evaluate import stay_offline
from remoe.eval.harness.groups import tasks_of
from remoe.eval.harness.tasks import TASKS, write_tasks


def main(arguments: list[str]) -> None:
    """Run lm_eval with these arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", "-t", nargs="+", default=[])
    parser.add_argument("--num_fewshot", "-f", type=int, default=0)
    own, _ = parser.parse_known_args(arguments)
    if own.data is None:
        return _lm_eval(arguments)
    stay_offline()
    names = tasks_of(name for part in own.tasks for name in part.split(","))
    with tempfile.TemporaryDirectory(prefix="remoe-tasks-") as folder:
        write_tasks([name for name in names if name in TASKS], own.data, Path(folder), own.num_fewshot)
        others = [*without(arguments, "--data", "--tasks", "-t"), "--tasks", *names, "--include_path", folder]
        _lm_eval(others, are_local=all(name in TASKS for name in names))


def without(arguments: list[str], *options: str) -> list[str]:
    """The arguments but for these options and their values."""
    kept: list[str] = []
    dropping = False
    for argument in arguments:
        if argument.startswith("-"):
            dropping = argument.partition("=")[0] in options
        if not dropping:
            kept.append(argument)
    return kept


def _lm_eval(arguments: list[str], are_local: bool = False) -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        raise MissingExtraError("lm_eval", "eval") from None
    import remoe.eval.harness.model  # noqa: F401  registers the model

    sys.argv[1:] = arguments
    with _without_defaults() if are_local else nullcontext():
        cli_evaluate()


@contextmanager
def _without_defaults() -> Iterator[None]:
    """Leave the harness's own thousands of tasks unread, which no option of its command line does."""
    from lm_eval import tasks

    manager = tasks.TaskManager
    tasks.TaskManager = partial(manager, include_defaults=False)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        tasks.TaskManager = manager


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RemoeError as error:
        print(f"remoe: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
