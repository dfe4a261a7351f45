"""Evaluation: how well a checkpoint predicts held-out text, per domain."""

from remoe.eval.held_out import Evaluation, Score, evaluate_checkpoint

__all__ = ["Evaluation", "Score", "evaluate_checkpoint"]
