"""`remoe demo`: ReLU, Top-K and dense on text that comes with Python and torch, in a few minutes."""

from typing import Annotated

from typer import Option

from remoe.cli.options import RUNS, Overrides, Root


def demo_command(
    overrides: Overrides = None,
    overwrite: Annotated[bool, Option("--overwrite", help="train again what is finished")] = False,
    root: Root = RUNS,
) -> None:
    """See it work in a few minutes.

    Trains ReLU, Top-K and dense models on text that comes with Python and torch, in the same order; writes one report.
    """
    from remoe.cli.report import report_on
    from remoe.cli.rows import as_table
    from remoe.recipes.demo import demo

    result = demo(overrides or (), root=root, overwrite=overwrite)
    comparison = result.comparison
    print(as_table(comparison.rows, num_seeds=1))
    print(f"unigram model: validation loss {result.unigram_loss:.4f} (add-one counts of the training text)")
    print(f"sparsity of ReLU over the last quarter: {result.sparsity:.4f} (target {result.target_sparsity:.4f})")
    print(report_on(comparison.runs, comparison.path / "report.html"))
