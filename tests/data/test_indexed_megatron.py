"""Our .bin/.idx files beside those of megatron-core's own builder, and each side's reader on the other's files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remoe.data import IndexedFile, IndexedWriter

pytestmark = pytest.mark.heavy

Corpus = list[list[list[int]]]
VOCABULARIES = {"uint16": 50_257, "int32": 128_000}
CORPORA: dict[str, Corpus] = {
    "one sequence a document": [[[5, 6, 7]], [[8]], [[9, 10]]],
    "several sequences a document": [[[1, 2], [3], [4, 5, 6]], [[7], [8, 9]]],
    "an empty document": [[[5, 6]], [[]], [[7]]],
    "an empty document at either end": [[[]], [[1, 2, 3]], [[]]],
    "an empty sequence within a document": [[[1], [], [2, 3]]],
    "no document": [],
}


@pytest.fixture(scope="module")
def megatron() -> Any:
    return pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="needs the extra megatron")


def random_corpus(vocab_size: int) -> Corpus:
    """300 documents of 0 to 4 sequences of 0 to 40 ids, over the whole vocabulary."""
    random = np.random.default_rng(0)
    sizes = [random.integers(0, 41, size=random.integers(0, 5)) for _ in range(300)]
    return [[random.integers(0, vocab_size, size).tolist() for size in document] for document in sizes]


@pytest.fixture(params=[*CORPORA, "random"])
def corpus(request: pytest.FixtureRequest, vocab_size: int) -> Corpus:
    return random_corpus(vocab_size) if request.param == "random" else CORPORA[request.param]


@pytest.fixture(params=VOCABULARIES)
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def vocab_size(dtype: str) -> int:
    return VOCABULARIES[dtype]


def joined(document: list[list[int]]) -> list[int]:
    return [token for sequence in document for token in sequence]


def write_ours(prefix: Path, corpus: Corpus, vocab_size: int) -> None:
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in corpus:
            lengths = [len(sequence) for sequence in document]
            writer.add_document(np.array(joined(document), dtype=np.int64), lengths)


def write_theirs(megatron: Any, prefix: Path, corpus: Corpus, dtype: str) -> None:
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=getattr(np, dtype))
    for document in corpus:
        lengths = [len(sequence) for sequence in document]
        builder.add_document(torch.tensor(joined(document), dtype=torch.int64), lengths)
    builder.finalize(f"{prefix}.idx")


def files(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def test_both_write_the_same_bytes(megatron: Any, tmp_path: Path, corpus: Corpus, dtype: str, vocab_size: int):
    write_ours(tmp_path / "ours", corpus, vocab_size)
    write_theirs(megatron, tmp_path / "theirs", corpus, dtype)
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


def test_megatron_picks_the_type_that_we_pick(megatron: Any, dtype: str, vocab_size: int):
    assert megatron.DType.optimal_dtype(vocab_size).__name__ == dtype


def test_megatron_reads_ours(megatron: Any, tmp_path: Path, dtype: str, vocab_size: int):
    corpus = [document for document in random_corpus(vocab_size) if document]
    write_ours(tmp_path / "ours", corpus, vocab_size)
    dataset: Any = megatron.IndexedDataset(str(tmp_path / "ours"))
    sequences = [sequence for document in corpus for sequence in document]
    assert [dataset[i].tolist() for i in range(len(dataset))] == sequences
    assert dataset[0].dtype == np.dtype(dtype)
    longest = max(range(len(sequences)), key=lambda index: len(sequences[index]))
    assert dataset.get(longest, offset=3, length=7).tolist() == sequences[longest][3:10]
    assert np.diff(dataset.document_indices).tolist() == [len(document) for document in corpus]


def test_we_read_megatrons(megatron: Any, tmp_path: Path, corpus: Corpus, dtype: str):
    write_theirs(megatron, tmp_path / "theirs", corpus, dtype)
    file = IndexedFile(tmp_path / "theirs")
    assert [file.document(i).tolist() for i in range(file.num_documents)] == [joined(document) for document in corpus]
    assert file.sequence_lengths.tolist() == [len(sequence) for document in corpus for sequence in document]
    assert file.dtype == np.dtype(dtype)


def test_a_file_merged_by_megatron_is_read(megatron: Any, tmp_path: Path, dtype: str):
    parts = {"first": CORPORA["several sequences a document"], "second": CORPORA["an empty document"]}
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "merged.bin"), dtype=getattr(np, dtype))
    for name, part in parts.items():
        write_theirs(megatron, tmp_path / name, part, dtype)
        builder.add_index(str(tmp_path / name))
    builder.finalize(str(tmp_path / "merged.idx"))
    file = IndexedFile(tmp_path / "merged")
    documents = [joined(document) for part in parts.values() for document in part]
    assert [file.document(i).tolist() for i in range(file.num_documents)] == documents
