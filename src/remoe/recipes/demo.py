"""The demo: three routers on the embedded corpus, and how much better than counting tokens they are."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from remoe.recipes.comparison import Comparison, compare
from remoe.recipes.plan import Plan
from remoe.recipes.results import late_mean

if TYPE_CHECKING:
    from remoe.training.config import TrainConfig

ROUTERS = ("relu", "topk", "dense")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """The demo's numbers; losses in nats per token."""

    comparison: Comparison
    unigram_loss: float
    sparsity: float
    """Of the ReLU run, over the last quarter of its steps."""
    target_sparsity: float


def demo(overrides: Sequence[str] = (), *, root: Path = Path("runs"), overwrite: bool = False) -> Demo:
    """Train what is missing of the three runs below `root`/demo and measure them against a unigram model."""
    from remoe.training import Run

    plan = Plan(name="demo", config="demo-relu", routers=ROUTERS, overrides=overrides)
    comparison = compare(plan, root=root, overwrite=overwrite)
    relu = Run.open(comparison.runs[0])
    sparsity = late_mean(relu.metrics(), "sparsity")
    assert sparsity is not None, f"{relu.path} has no sparsity in its metrics"
    model = relu.config.model
    return Demo(
        comparison=comparison,
        unigram_loss=unigram_loss(relu.config),
        sparsity=sparsity,
        target_sparsity=1 - model.top_k / model.num_experts,
    )


def unigram_loss(config: "TrainConfig") -> float:
    """Cross-entropy of the validation batches under the training text's token counts plus one, in nats per token."""
    import numpy as np

    from remoe.data import open_corpus, validation_batches

    corpus = open_corpus(config.data)
    counts_V = np.ones(corpus.tokenizer.vocab_size)
    for document in range(corpus.train.num_documents):
        counts_V += np.bincount(corpus.train.document(document), minlength=len(counts_V))
    loss_V = -np.log(counts_V / counts_V.sum())
    loop = config.train
    batches = validation_batches(
        corpus.validation, config.data.sequence_length, loop.batch_size, loop.validation_batches
    )
    labels = np.concatenate([batch.labels_BS.numpy().ravel() for batch in batches])
    return float(loss_V[labels[labels >= 0]].mean())
