"""Which tokens a step reads: a pure function of (seed, step), the same for any split into micro-batches.

As in Megatron: an epoch's documents are shuffled and joined, cut into samples of S + 1 tokens that share their end
tokens (each token is a label once), and the samples are shuffled. Blends interleave by a fixed pattern.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remoe.data.dataset import AnyDataset, TokenDataset
from remoe.errors import DataError

NO_LABEL = -100
NO_TOKEN = -1  # in samples: padding, and its document; as a label: none
PATTERN = 10_000  # samples after which a blend repeats its pattern: weights are exact to 1e-4


class Batch(NamedTuple):
    """Sequences of one forward pass, all int64 [B, S].

    labels: the next token, -100 where there is none. document: equal numbers in a row are the same document, -1 is
    padding.
    domain: index into the dataset's `domains`, of the document that the label is in.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    document_BS: Tensor
    domain_BS: Tensor


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches of sequences of one length as one."""
    return Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


class Sampler:
    """Training batches of `batch_size` sequences of `sequence_length` tokens.

    Raises DataError if a source of the dataset is shorter than one sequence and its next token.
    """

    def __init__(self, dataset: AnyDataset, sequence_length: int, batch_size: int, seed: int) -> None:
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        seed %= 2**64  # numpy takes none below 0
        self._orders = [
            _order_of(source, sequence_length, (seed, place)) for place, (source, _) in enumerate(dataset.sources)
        ]
        self._pattern = blend_pattern([weight for _, weight in dataset.sources])

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of a step counted from 0, or some of its rows."""
        return self.rows(step, (rows,))

    def rows(self, step: int, parts: Iterable[slice]) -> Batch:
        """Several stretches of a batch's rows, one after the other."""
        first = step * self.batch_size
        rows = [row for part in parts for row in range(self.batch_size)[part]]
        return _stack([self._sample(first + row) for row in rows])

    def _sample(self, index: int) -> NDArray[np.int64]:
        period, place = divmod(index, PATTERN)
        source = self._pattern.source[place]
        within = period * int(self._pattern.counts[source]) + int(self._pattern.rank[place])
        return self._orders[source].sample(within)


def validation_batches(dataset: AnyDataset, sequence_length: int, batch_size: int, num_batches: int) -> Iterator[Batch]:
    """The same batches each time, domain after domain in turn, so that even a few of them see every domain.

    Sequences do not overlap and none comes twice: there are fewer batches, and a shorter last one, where the text
    runs out. A domain shorter than one sequence is filled up with tokens that have no label.
    """
    num_samples = max(num_batches * batch_size, len(dataset.domains))
    windows = _round_robin(_windows_per_domain(dataset, sequence_length), num_samples)
    samples = [stream.read_padded(start, sequence_length + 1) for stream, start in windows]
    for start in range(0, len(samples), batch_size):
        yield _stack(samples[start : start + batch_size])


class BlendPattern(NamedTuple):
    """For each of PATTERN places the source and its rank among the places of that source; the counts per source."""

    source: NDArray[np.int64]
    rank: NDArray[np.int64]
    counts: NDArray[np.int64]


def blend_pattern(weights: Sequence[float]) -> BlendPattern:
    """Share PATTERN places by weight, at least one each, evenly spread, so that any stretch is a fair mix."""
    shares = np.array(weights, dtype=np.float64) / sum(weights) * PATTERN
    counts = np.maximum(np.floor(shares).astype(np.int64), 1)
    while counts.sum() != PATTERN:
        missing = np.sign(PATTERN - counts.sum())
        counts[np.argmax((shares - counts) * missing)] += missing
    source = np.repeat(np.arange(len(counts)), counts)
    rank = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((rank + 0.5) / counts[source], kind="stable")
    return BlendPattern(source[order], rank[order], counts)


class TokenStream:
    """Documents of a dataset in a given order, read as one sequence of tokens."""

    def __init__(self, dataset: TokenDataset, order_D: NDArray[np.int64]) -> None:
        self._dataset = dataset
        self._order = order_D
        self._ends = np.cumsum(dataset.lengths[order_D])
        self.num_tokens = int(self._ends[-1]) if len(order_D) else 0

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Rows token id, document (numbered from 0 in this stretch), domain, each int64 [count]."""
        first = int(np.searchsorted(self._ends, start, "right"))
        last = int(np.searchsorted(self._ends, start + count - 1, "right"))
        documents = self._order[first : last + 1]
        ends = self._ends[first : last + 1]
        begins = ends - self._dataset.lengths[documents]
        counts = np.minimum(ends, start + count) - np.maximum(begins, start)
        shift = np.repeat(self._dataset.starts[documents] - begins, counts)
        return np.stack(
            (
                self._dataset.read(np.arange(start, start + count) + shift),
                np.repeat(np.arange(len(documents)), counts),
                np.repeat(self._dataset.domain_of_document[documents], counts),
            )
        )

    def read_padded(self, start: int, count: int) -> NDArray[np.int64]:
        """Like `read`, but past the end of the stream the token is -1."""
        stretch = self.read(start, min(count, self.num_tokens - start))
        return padded(stretch, count)


def padded(sample: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """A sample of rows (token, document, domain and perhaps label), filled up to `count` places with padding."""
    padding = np.repeat(sample[:, -1:], count - sample.shape[1], axis=1)
    padding[[row for row in range(len(sample)) if row != 2]] = NO_TOKEN
    return np.concatenate((sample, padding), axis=1)


def _order_of(source: TokenDataset, sequence_length: int, seed: tuple[int, ...]) -> Any:
    """The source's own order of samples where it has one: instructions are not cut at any token."""
    own = getattr(source, "sample_order", None)
    return own(sequence_length, seed) if own else _SampleOrder(source, sequence_length, seed)


class _SampleOrder:
    """The samples of one source, epoch after epoch, each epoch in its own order."""

    def __init__(self, dataset: TokenDataset, sequence_length: int, seed: tuple[int, ...]) -> None:
        self._dataset, self._sequence_length, self._seed = dataset, sequence_length, seed
        self.samples_per_epoch = (dataset.num_tokens - 1) // sequence_length
        self._epochs: dict[int, tuple[TokenStream, NDArray[np.int64]]] = {}
        if self.samples_per_epoch < 1:
            raise too_short(dataset, sequence_length)

    def sample(self, index: int) -> NDArray[np.int64]:
        epoch, place = divmod(index, self.samples_per_epoch)
        stream, order = self._epoch(epoch)
        return stream.read(int(order[place]) * self._sequence_length, self._sequence_length + 1)

    def _epoch(self, epoch: int) -> tuple[TokenStream, NDArray[np.int64]]:
        if epoch not in self._epochs:
            documents = shuffled(self._dataset.num_documents, (*self._seed, epoch, 0))
            samples = shuffled(self.samples_per_epoch, (*self._seed, epoch, 1))
            while len(self._epochs) > 1:  # a batch spans two epochs at most, unless the text is tiny
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = TokenStream(self._dataset, documents), samples
        return self._epochs[epoch]


def too_short(dataset: AnyDataset, sequence_length: int) -> DataError:
    """The error for text that does not fill one sequence."""
    return DataError(
        f"{dataset.name} holds {dataset.num_tokens:,} tokens, must hold at least data.sequence_length + 1 = "
        f"{sequence_length + 1:,}; lower data.sequence_length or give more text"
    )


def shuffled(count: int, seed: tuple[int, ...]) -> NDArray[np.int64]:
    """A permutation of 0 to count - 1 that is the same with every version of numpy."""
    # numpy promises stable raw bits of a bit generator, but not a stable Generator.permutation
    bits = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(bits, kind="stable")


def _windows_per_domain(dataset: AnyDataset, sequence_length: int) -> list[list[tuple[TokenStream, int]]]:
    found: list[list[tuple[TokenStream, int]]] = []
    for domain in range(len(dataset.domains)):
        windows: list[tuple[TokenStream, int]] = []
        for source, _ in dataset.sources:
            own = getattr(source, "validation_windows", None)
            windows.extend(own(domain, sequence_length) if own else _windows(source, domain, sequence_length))
        found.append([windows[i] for i in shuffled(len(windows), (0, domain))])
    return found


def _windows(source: TokenDataset, domain: int, sequence_length: int) -> Iterator[tuple[TokenStream, int]]:
    stream = TokenStream(source, np.flatnonzero(source.domain_of_document == domain))
    count = max((stream.num_tokens - 1) // sequence_length, int(stream.num_tokens > 1))
    return ((stream, place * sequence_length) for place in range(count))


def _round_robin(queues: Sequence[Sequence[tuple[TokenStream, int]]], count: int) -> list[tuple[TokenStream, int]]:
    longest = max((len(queue) for queue in queues), default=0)
    turns = (queue[turn] for turn in range(longest) for queue in queues if turn < len(queue))
    return [window for window, _ in zip(turns, range(count), strict=False)]


def _stack(samples: Sequence[NDArray[np.int64]]) -> Batch:
    """Samples of rows (token, document, domain) [3, S + 1] to a batch; a fourth row holds the labels' own tokens."""
    rows = torch.from_numpy(np.stack(samples, axis=1))
    tokens, documents, domains = rows[:3]
    labels = rows[-1 if len(rows) == 4 else 0, :, 1:].clone()
    return Batch(
        tokens_BS=tokens[:, :-1].clamp(min=0),
        labels_BS=labels.masked_fill_(labels < 0, NO_LABEL),
        document_BS=documents[:, :-1].contiguous(),
        domain_BS=domains[:, 1:].contiguous(),
    )
