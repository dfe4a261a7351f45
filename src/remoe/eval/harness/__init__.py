"""lm-evaluation-harness: the one place that imports lm_eval. `harness.model` registers our model with it."""

from remoe.eval.harness.evaluate import HarnessConfig, evaluate_tasks
from remoe.eval.harness.groups import GROUPS
from remoe.eval.harness.tasks import TASKS, write_tasks

__all__ = ["GROUPS", "TASKS", "HarnessConfig", "evaluate_tasks", "write_tasks"]
