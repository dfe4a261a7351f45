"""Tokenised documents with their domains: one file of tokens, or several blended by weight."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from remoe.errors import DataError

SCAN_BYTES = 2 << 30  # larger files are not scanned when opened; each batch is checked anyway


class Documents(NamedTuple):
    """Where documents lie in an array of tokens, and of which domain (an index) each one is."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    domains: NDArray[np.int64]


class TokenDataset:
    """Documents in one array of token ids [N], which may be mapped from a file.

    `domains` are the names that `domain_of_document` [D] points to. Reading an id at or above vocab_size raises
    DataError.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        documents: Documents,
        domains: Sequence[str],
        vocab_size: int,
        name: str = "dataset",
    ) -> None:
        self.tokens = tokens
        self.domains = tuple(domains)
        self.vocab_size = vocab_size
        self.name = name
        self._documents = documents
        self.num_tokens = int(documents.lengths.sum())

    @classmethod
    def from_documents(
        cls, documents: Sequence[ArrayLike], vocab_size: int, domain_of_document: Sequence[str] | None = None
    ) -> "TokenDataset":
        """A dataset in memory, for tests and small experiments."""
        arrays = [np.asarray(document, dtype=np.int32) for document in documents]
        lengths = np.array([len(tokens) for tokens in arrays], dtype=np.int64)
        names = list(domain_of_document or ["text"] * len(arrays))
        domains = tuple(dict.fromkeys(names))
        table = Documents(np.cumsum(lengths) - lengths, lengths, np.array([domains.index(name) for name in names]))
        return cls(np.concatenate(arrays), table, domains, vocab_size)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self._documents.starts)

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where each document starts in `tokens`, int64 [D]."""
        return self._documents.starts

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each document, int64 [D]."""
        return self._documents.lengths

    @property
    def domain_of_document(self) -> NDArray[np.int64]:
        """Index into `domains` of each document, int64 [D]."""
        return self._documents.domains

    @property
    def sources(self) -> tuple[tuple["TokenDataset", float], ...]:
        """The datasets this one is made of, with their weights: itself."""
        return ((self, 1.0),)

    def document(self, index: int) -> NDArray[np.int64]:
        """The token ids of one document."""
        start = self.starts[index]
        return self.read(np.arange(start, start + self.lengths[index]))

    def read(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The token ids at some positions of `tokens`."""
        ids = self.tokens[positions].astype(np.int64)
        self._check_ids(ids)
        return ids

    def check_all_ids(self) -> None:
        """Raise DataError if any id is outside the vocabulary. Files above 2 GiB are left to be checked as read."""
        if self.tokens.nbytes > SCAN_BYTES:
            return
        for start in range(0, len(self.tokens), 1 << 24):
            self._check_ids(self.tokens[start : start + (1 << 24)])

    def subset(self, documents: Documents) -> "TokenDataset":
        """The same tokens with other documents in them."""
        return TokenDataset(self.tokens, documents, self.domains, self.vocab_size, self.name)

    def select(self, index: NDArray[Any]) -> "TokenDataset":
        """Some of the documents, by index or mask."""
        return self.subset(Documents(*(column[index] for column in self._documents)))

    def with_domains(self, names: Sequence[str]) -> "TokenDataset":
        """The same documents with domains that point into a longer list of names."""
        places = np.array([names.index(name) for name in self.domains], dtype=np.int64)
        documents = self._documents._replace(domains=places[self.domain_of_document])
        return TokenDataset(self.tokens, documents, names, self.vocab_size, self.name)

    def tokens_per_domain(self) -> dict[str, int]:
        """Number of tokens of each domain by name."""
        counts = np.zeros(len(self.domains), dtype=np.int64)
        np.add.at(counts, self.domain_of_document, self.lengths)
        return dict(zip(self.domains, counts.tolist(), strict=True))

    def _check_ids(self, ids: NDArray[Any]) -> None:
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.vocab_size):
            bad = ids.max() if ids.max() >= self.vocab_size else ids.min()
            raise DataError(
                f"{self.name} holds token id {bad}, must be below the tokenizer's vocabulary of {self.vocab_size}: "
                "the file is damaged or was made with another tokenizer"
            )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if isinstance(self.tokens, np.memmap):  # the other process maps the file again
            state["tokens"] = (self.tokens.filename, self.tokens.dtype.str)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["tokens"], tuple):
            state["tokens"] = np.memmap(*state["tokens"], mode="r")
        self.__dict__.update(state)


class BlendedDataset:
    """Several datasets as one: documents one dataset after the other, samples by weight. All share their domains."""

    def __init__(self, sources: Sequence[tuple[TokenDataset, float]]) -> None:
        total = sum(weight for _, weight in sources)
        self.sources = tuple((dataset, weight / total) for dataset, weight in sources)
        self.domains = self.sources[0][0].domains
        self.vocab_size = self.sources[0][0].vocab_size
        self.name = " + ".join(dataset.name for dataset, _ in sources)
        self.num_documents = sum(dataset.num_documents for dataset, _ in sources)
        self.num_tokens = sum(dataset.num_tokens for dataset, _ in sources)
        assert all(dataset.domains == self.domains for dataset, _ in sources), "a blend shares one list of domains"

    @property
    def domain_of_document(self) -> NDArray[np.int64]:
        """Index into `domains` of each document, int64 [D]."""
        return np.concatenate([dataset.domain_of_document for dataset, _ in self.sources])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each document, int64 [D]."""
        return np.concatenate([dataset.lengths for dataset, _ in self.sources])

    def document(self, index: int) -> NDArray[np.int64]:
        """The token ids of one document."""
        for dataset, _ in self.sources:
            if index < dataset.num_documents:
                return dataset.document(index)
            index -= dataset.num_documents
        raise IndexError(f"the blend has {self.num_documents} documents")

    def tokens_per_domain(self) -> dict[str, int]:
        """Number of tokens of each domain by name."""
        counts = [dataset.tokens_per_domain() for dataset, _ in self.sources]
        return {name: sum(count[name] for count in counts) for name in self.domains}


AnyDataset = TokenDataset | BlendedDataset
