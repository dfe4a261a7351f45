"""How often each token id occurs in a dataset."""

import numpy as np
from numpy.typing import NDArray

from remoe.data.dataset import AnyDataset
from remoe.data.sampler import TokenStream

PIECE = 1 << 22


def token_counts(dataset: AnyDataset, vocab_size: int) -> NDArray[np.float64]:
    """Occurrences of each token id, float64 [V]; of a blend, by the weights of its parts and as many in all."""
    counts = np.zeros(vocab_size)
    for source, weight in dataset.sources:
        stream = TokenStream(source, np.arange(source.num_documents))
        own = np.zeros(vocab_size)
        for start in range(0, stream.num_tokens, PIECE):
            tokens = stream.read(start, min(PIECE, stream.num_tokens - start))[0]
            own += np.bincount(tokens, minlength=vocab_size)
        counts += own * (weight * dataset.num_tokens / max(1, stream.num_tokens))
    return counts
