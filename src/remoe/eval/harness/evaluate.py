"""lm-evaluation-harness on one of our models: tasks in, the harness's own results out."""

# pyright: reportMissingImports=false

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remoe.errors import ConfigError, nearest
from remoe.eval.harness.groups import GROUPS, add_averages, tasks_of
from remoe.eval.harness.tasks import TASKS, harness_folder, write_tasks

BOOTSTRAP_DRAWS = 1000
"""For standard errors without a formula (LAMBADA's perplexity); the harness's 100,000 take minutes."""


@dataclass(frozen=True, kw_only=True)
class HarnessConfig:
    """How the harness runs."""

    num_fewshot: int | None = None
    """Examples to show; None: as each task says, mostly none."""
    limit: int | None = None
    """Documents of each task; None: all."""
    batch_size: int = 16
    device: str = "auto"
    max_length: int | None = None
    """Tokens read of one request; None: the length that the run was trained with."""
    precision: str | None = None
    threshold: float | None = None
    """The density dial, for all layers in place of the saved thresholds; None: those."""


def evaluate_tasks(
    path: Path | str, tasks: Sequence[str], data: Path | str | None = None, config: HarnessConfig | None = None
) -> dict[str, Any]:
    """Score a run, a checkpoint or an export on tasks of the harness, or on groups of them (`groups.GROUPS`).

    `data`: a folder with the tasks' jsonl files, read without a network; None: the harness fetches its own. Returns
    the harness's results, with the averages of the groups. Raises ConfigError for a task that there is not, DataError
    for files that do not fit, MissingExtraError without lm_eval.
    """
    config = config or HarnessConfig()
    names = tasks_of(tasks)
    if not names:
        raise ConfigError(
            f"--tasks names no task, must name some: {', '.join((*GROUPS, *TASKS))}, or others of lm_eval's"
        )
    with tempfile.TemporaryDirectory(prefix="remoe-tasks-") as folder:
        if data is not None:
            stay_offline()
            write_tasks(names, Path(data), Path(folder), config.num_fewshot or 0)
        results = _run(path, names, None if data is None else folder, config)
    add_averages(results)
    return results


def stay_offline() -> None:
    """Tell the Hugging Face libraries, before their first import, that there is no network."""
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[variable] = "1"


def _run(path: Path | str, names: Sequence[str], folder: str | None, config: HarnessConfig) -> dict[str, Any]:
    harness_folder()  # says how to install it
    with _quiet():
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable

        import remoe.eval.harness.model  # noqa: F401  registers the model

        manager: Any = TaskManager(include_path=folder, include_defaults=folder is None)
        _check_names(names, manager.all_tasks)
        run: Any = simple_evaluate
        results = run(
            model="remoe",
            model_args={
                "pretrained": str(path),
                "max_length": config.max_length,
                "precision": config.precision,
                "threshold": config.threshold,
            },
            tasks=list(names),
            task_manager=manager,
            num_fewshot=config.num_fewshot,
            batch_size=config.batch_size,
            device=config.device,
            limit=config.limit,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            log_samples=False,
        )
    assert results is not None, "one process evaluates"
    return json.loads(json.dumps(results, default=handle_non_serializable))


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            hint = nearest(name, (*known, *GROUPS), otherwise="")
            raise ConfigError(
                f"--tasks names {name!r}, must name tasks of lm-evaluation-harness (`lm_eval ls tasks` lists them) or "
                f"the groups {' and '.join(GROUPS)}; {hint or 'try --tasks piqa'}"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the harness logs about its own choices, and the bars of reading files."""
    import datasets

    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
        logger.setLevel(before)
