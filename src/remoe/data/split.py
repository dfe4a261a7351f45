"""Hold out documents for validation, chosen by a hash of their tokens: the same ones each time, whatever joins them."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from remoe.data.dataset import Documents, TokenDataset
from remoe.errors import DataError


def hold_out(dataset: TokenDataset, fraction: float, minimum: int) -> tuple[TokenDataset, TokenDataset]:
    """Split a dataset into training and validation parts of at least `minimum` tokens each, without common documents.

    Each domain with several documents is held out too, with half the fraction of its tokens or more. Text of too few
    documents for all that is cut inside one. Equal documents stay together. Raises DataError where the text is too
    short for two parts.
    """
    if dataset.num_tokens < 2 * minimum:
        raise DataError(
            f"{dataset.name} holds {dataset.num_tokens:,} tokens; training and held-out validation need one sequence "
            f"of data.sequence_length + 1 = {minimum:,} each; lower data.sequence_length, give more text, or give "
            "data.validation"
        )
    keys = document_keys(dataset)
    held = _chosen(dataset, keys, fraction)
    num_held = int(dataset.lengths[held].sum())
    most = min(dataset.num_tokens - minimum, max(2 * fraction, 0.5) * dataset.num_tokens)
    if minimum <= num_held <= most:
        return dataset.select(~held), dataset.select(held)
    wanted = max(minimum, round(fraction * dataset.num_tokens))
    return _cut(dataset, keys, min(wanted, dataset.num_tokens - minimum))


def document_keys(dataset: TokenDataset) -> NDArray[np.uint64]:
    """A hash of each document's tokens, uint64 [D]; equal documents have equal keys."""
    keys = np.empty(dataset.num_documents, dtype=np.uint64)
    for index in range(dataset.num_documents):
        start = dataset.starts[index]
        tokens = dataset.tokens[start : start + dataset.lengths[index]].astype("<i4")
        keys[index] = int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little")
    return keys


def _chosen(dataset: TokenDataset, keys: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    held = np.zeros(dataset.num_documents, dtype=bool)
    for domain in np.unique(dataset.domain_of_document):
        inside = np.flatnonzero(dataset.domain_of_document == domain)
        order = inside[np.argsort(keys[inside], kind="stable")]
        held[order[: _num_held(keys[order], dataset.lengths[order], fraction)]] = True
    return held


def _num_held(keys: NDArray[np.uint64], lengths: NDArray[np.int64], fraction: float) -> int:
    """How many of a domain's documents, sorted by key, to hold out; equal ones together, but never all."""
    below = int(np.searchsorted(keys, np.uint64(fraction * 2.0**64)))
    ends = np.cumsum(lengths)
    enough = int(np.searchsorted(ends, fraction / 2 * ends[-1])) + 1  # few documents: chance may hold out next to none
    last = keys[min(max(below, enough), len(keys)) - 1]
    return int(min(np.searchsorted(keys, last, "right"), np.searchsorted(keys, keys[-1], "left")))


def _cut(dataset: TokenDataset, keys: NDArray[np.uint64], wanted: int) -> tuple[TokenDataset, TokenDataset]:
    """Hold out `wanted` tokens: documents in the order of their keys, of the last one only its end."""
    order = np.argsort(keys, kind="stable")
    ends = np.cumsum(dataset.lengths[order])
    whole = int(np.searchsorted(ends, wanted, "right"))
    missing = wanted - (int(ends[whole - 1]) if whole else 0)
    held, kept = order[:whole], order[whole:]
    if not missing:
        return dataset.select(np.sort(kept)), dataset.select(np.sort(held))
    start, length, domain = (column[kept[:1]] for column in _columns(dataset))
    head = Documents(start, length - missing, domain)
    tail = Documents(start + length - missing, np.array([missing]), domain)
    train, validation = _joined(dataset, np.sort(kept[1:]), head), _joined(dataset, np.sort(held), tail)
    return dataset.subset(train), dataset.subset(validation)


def _columns(dataset: TokenDataset) -> Documents:
    return Documents(dataset.starts, dataset.lengths, dataset.domain_of_document)


def _joined(dataset: TokenDataset, index: NDArray[np.int64], last: Documents) -> Documents:
    columns = (np.concatenate((column[index], more)) for column, more in zip(_columns(dataset), last, strict=True))
    return Documents(*columns)
