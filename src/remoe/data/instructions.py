"""Instructions and answers as training data: whole conversations a row, of which only the answers are labels."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from remoe.data.chat import ChatTemplate, encode_messages, load_template, messages_of
from remoe.data.dataset import Documents, TokenDataset
from remoe.data.sampler import NO_TOKEN, padded, shuffled
from remoe.data.split import document_keys
from remoe.data.tokenizer import Tokenizer
from remoe.errors import DataError


class InstructionDataset(TokenDataset):
    """Conversations as documents; `is_answer` [N] tells which of the tokens the model has to say.

    A row holds one conversation, or with `packing` as many as fit; what is longer than a row is cut.
    """

    def __init__(
        self, tokens: NDArray[Any], is_answer: NDArray[np.bool_], documents: Documents, domains: Sequence[str],
        vocab_size: int, name: str, packing: bool,
    ) -> None:  # fmt: skip
        super().__init__(tokens, documents, domains, vocab_size, name)
        self.is_answer = is_answer
        self.packing = packing

    def subset(self, documents: Documents) -> "InstructionDataset":
        """See TokenDataset."""
        return InstructionDataset(
            self.tokens, self.is_answer, documents, self.domains, self.vocab_size, self.name, self.packing
        )

    def select(self, index: NDArray[Any]) -> "InstructionDataset":
        """See TokenDataset."""
        return self.subset(Documents(*(column[index] for column in self._documents)))

    def with_domains(self, names: Sequence[str]) -> "InstructionDataset":
        """See TokenDataset."""
        documents = super().with_domains(names)._documents
        return InstructionDataset(
            self.tokens, self.is_answer, documents, names, self.vocab_size, self.name, self.packing
        )

    def sample_order(self, sequence_length: int, seed: tuple[int, ...]) -> "RowOrder":
        """The order in which a run with this seed reads rows; see Sampler."""
        return RowOrder(self, sequence_length, seed)

    def validation_windows(self, domain: int, sequence_length: int) -> list[tuple["RowOrder", int]]:
        """Each row of a domain once, as (reader, place); see validation_batches."""
        own = np.flatnonzero(self.domain_of_document == domain)
        order = RowOrder(self.select(own), sequence_length, (0,))
        return [(order, place) for place in range(len(order.rows))]

    def row(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Conversations one after the other: token, document (from 0 in this row), domain, label; int64 [4, n]."""
        return np.concatenate([self._columns(place, index) for place, index in enumerate(documents)], axis=1)

    def _columns(self, place: int, index: int) -> NDArray[np.int64]:
        start = self.starts[index]
        positions = np.arange(start, start + self.lengths[index])
        tokens = self.read(positions)
        labels = np.where(self.is_answer[positions], tokens, NO_TOKEN)
        labels[0] = NO_TOKEN  # what comes before it in the row is another conversation
        marks = np.broadcast_to([[place], [self.domain_of_document[index]]], (2, len(tokens)))
        return np.concatenate((tokens[None], marks, labels[None]))


def hold_out_conversations(
    dataset: InstructionDataset, fraction: float
) -> tuple[InstructionDataset, InstructionDataset]:
    """Training and validation parts, chosen by a hash of each conversation: the same ones for each seed.

    Raises DataError where there are too few for two parts.
    """
    keys = document_keys(dataset)
    held = keys < np.uint64(fraction * 2.0**64)
    held |= keys == keys.min()  # never none
    if held.all():
        raise DataError(
            f"{dataset.name} holds {dataset.num_documents} conversations that are too alike or too few to hold some "
            "out; give data.validation"
        )
    return dataset.select(~held), dataset.select(held)


class RowOrder:
    """The rows of a dataset, epoch after epoch, each epoch in its own order: a function of the seed alone."""

    def __init__(self, dataset: InstructionDataset, sequence_length: int, seed: tuple[int, ...]) -> None:
        self._dataset, self._length, self._seed = dataset, sequence_length + 1, seed
        order = shuffled(dataset.num_documents, (*seed, 0))
        cut = np.minimum(dataset.lengths[order], self._length)
        self.rows = packed(order, cut, self._length) if dataset.packing else list(order[:, None])
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def sample(self, index: int) -> NDArray[np.int64]:
        """Row number `index` over all epochs, padded: int64 [4, S + 1]."""
        epoch, place = divmod(index, len(self.rows))
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = shuffled(len(self.rows), (*self._seed, epoch, 1))
        return self.read_padded(int(self._epochs[epoch][place]), self._length)

    def read_padded(self, start: int, count: int) -> NDArray[np.int64]:
        """One row, cut or padded to `count` tokens."""
        return padded(self._dataset.row(self.rows[start])[:, :count], count)


def packed(order: NDArray[np.int64], lengths: NDArray[np.int64], room: int) -> list[NDArray[np.int64]]:
    """Consecutive documents in rows of at most `room` tokens together; `lengths` are theirs, in this order."""
    rows: list[NDArray[np.int64]] = []
    start = used = 0
    for place, length in enumerate(lengths.tolist()):
        if used + length > room:
            rows.append(order[start:place])
            start, used = place, 0
        used += length
    return [*rows, order[start:]]


class Reading(NamedTuple):
    """How conversations become rows."""

    tokenizer: Tokenizer
    template: str
    sequence_length: int
    packing: bool


def open_instructions(path: Path, domain: str, reading: Reading) -> InstructionDataset:
    """The conversations of a jsonl file (or a JSON list, Alpaca's own form), tokenised.

    One whose answers all lie beyond a row is left out. Raises DataError for a row of another form, and where none is
    left.
    """
    template = load_template(reading.template)
    ids: list[NDArray[np.int32]] = []
    answers: list[NDArray[np.bool_]] = []
    for where, row in _rows(path):
        tokens, is_answer = _encoded(where, row, template, reading.tokenizer)
        if is_answer[1 : reading.sequence_length + 1].any():
            ids.append(tokens)
            answers.append(is_answer)
    if not ids:
        raise DataError(
            f"{path} holds no conversation whose answer begins within data.sequence_length = {reading.sequence_length} "
            "tokens; raise it"
        )
    lengths = np.array([len(tokens) for tokens in ids], dtype=np.int64)
    documents = Documents(np.cumsum(lengths) - lengths, lengths, np.zeros(len(ids), dtype=np.int64))
    return InstructionDataset(
        np.concatenate(ids), np.concatenate(answers), documents, (domain,), reading.tokenizer.vocab_size, str(path),
        reading.packing,
    )  # fmt: skip


def _encoded(
    where: str, row: Any, template: ChatTemplate, tokenizer: Tokenizer
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    try:
        return encode_messages(tokenizer, template, messages_of(row))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row, and where it stands."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip()[:1] == "[":
        for number, row in enumerate(_parsed(str(path), text), start=1):
            yield f"{path}, row {number}", row
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parsed(f"{path}:{number}", line)


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error})") from None
