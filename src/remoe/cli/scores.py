"""The scores of `remoe eval` as tables."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from remoe.cli.table import number, table

if TYPE_CHECKING:
    from remoe.eval import Evaluation


def text_table(result: "Evaluation") -> str:
    """Losses on text, per domain and together."""
    header = ("text", "loss", "perplexity", "bits/byte", "bits/character", "tokens")
    scores = [*result.per_domain.items(), ("all", result.total)]
    columns = ("loss", "perplexity", "bits_per_byte", "bits_per_character")
    rows = [
        (name, *(f"{getattr(score, column):.4f}" for column in columns), f"{score.tokens:,}") for name, score in scores
    ]
    text = f"{table(header, rows)}\nactive experts per token: {number(result.active_experts, '.3f')}"
    others = (f"\n\nevaluated as {way}:\n{text_table(other)}" for way, other in result.others.items())
    return text + "".join(others)


def task_table(results: dict[str, Any]) -> str:
    """The harness's results: each metric of each task with its standard error, then the groups' averages."""
    header = ("task", "split", "shots", "n", "metric", "value", "std. error")
    rows = [row for name, scores in results["results"].items() for row in _task_rows(name, scores, results)]
    rows += [row for name, scores in results.get("groups", {}).items() for row in _rows(name, "", "", scores)]
    return table(header, rows)


def _task_rows(name: str, scores: dict[str, Any], results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    config = results["configs"].get(name, {})
    split = config.get("test_split") or config.get("validation_split") or ""
    return _rows(name, split, str(results["n-shot"].get(name, "")), scores)


def _rows(name: str, split: str, shots: str, scores: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, value in scores.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = scores.get(f"{metric}_stderr,{chosen}")
        yield name, split, shots, f"{scores['sample_len']:,}", metric, _shown(value), _shown(error)


def _shown(value: Any) -> str:
    return number(value, ".4f") if isinstance(value, float) else "-"
