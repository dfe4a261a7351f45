import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe.data import IndexedFile, IndexedWriter
from remoe.data.indexed import token_dtype
from remoe.errors import DataError

# documents [5, 6, 7], [] and [8, 9] + [1] by hand: magic, version 1, code 8 (uint16), 4 sequences, 4 boundaries
GOLDEN_IDX = (
    b"MMIDIDX\x00\x00"
    + struct.pack("<QBQQ", 1, 8, 4, 4)
    + struct.pack("<4i", 3, 0, 2, 1)
    + struct.pack("<4q", 0, 6, 6, 10)
    + struct.pack("<4q", 0, 1, 2, 4)
)
GOLDEN_BIN = struct.pack("<6H", 5, 6, 7, 8, 9, 1)


def write_golden(prefix):
    with IndexedWriter(prefix, vocab_size=257) as writer:
        writer.add_document(np.array([5, 6, 7]))
        writer.add_document(np.array([], dtype=np.int64))
        writer.add_document(np.array([8, 9, 1]), lengths=[2, 1])


def test_the_writer_gives_megatrons_bytes(tmp_path):
    write_golden(tmp_path / "data")
    assert (tmp_path / "data.idx").read_bytes() == GOLDEN_IDX
    assert (tmp_path / "data.bin").read_bytes() == GOLDEN_BIN


def test_the_reader_joins_the_sequences_of_a_document(tmp_path):
    (tmp_path / "data.idx").write_bytes(GOLDEN_IDX)
    (tmp_path / "data.bin").write_bytes(GOLDEN_BIN)
    file = IndexedFile(tmp_path / "data")
    assert [file.document(i).tolist() for i in range(3)] == [[5, 6, 7], [], [8, 9, 1]]
    assert file.document_starts.tolist() == [0, 3, 3]


def test_int32_tokens_carry_code_4(tmp_path):
    with IndexedWriter(tmp_path / "data", vocab_size=100_000) as writer:
        writer.add_document(np.array([70_000]))
    assert (tmp_path / "data.idx").read_bytes()[17] == 4
    assert (tmp_path / "data.bin").read_bytes() == struct.pack("<i", 70_000)


def test_ids_are_uint16_below_65500_as_in_megatron():
    assert [token_dtype(size).str for size in (257, 65_499, 65_500)] == ["<u2", "<u2", "<i4"]


def test_pointers_past_4_gib_do_not_overflow(tmp_path):
    writer = IndexedWriter(tmp_path / "data", vocab_size=100_000)
    with writer:
        writer._lengths.extend([2**31 - 1, 2**31 - 1, 1])  # as if that much had been written
        content = writer.index_bytes()
        del writer._lengths[:]
    pointers = struct.unpack_from("<3q", content, 34 + 12)
    assert pointers == (0, 4 * (2**31 - 1), 8 * (2**31 - 1))


documents_of_sequences = st.lists(st.lists(st.lists(st.integers(0, 256), max_size=5), max_size=3), max_size=8)


@given(documents_of_sequences)
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory, documents):
    prefix = tmp_path_factory.mktemp("indexed") / "corpus.v1"
    flat = [[token for sequence in document for token in sequence] for document in documents]
    with IndexedWriter(prefix, 257) as writer:
        for document, tokens in zip(documents, flat, strict=True):
            writer.add_document(np.array(tokens, dtype=np.int64), [len(sequence) for sequence in document])
    file = IndexedFile(prefix)
    assert [file.document(i).tolist() for i in range(file.num_documents)] == flat
    assert file.sequence_lengths.tolist() == [len(sequence) for document in documents for sequence in document]


def test_a_failed_writer_leaves_nothing(tmp_path):
    def fail():
        with IndexedWriter(tmp_path / "data", 257) as writer:
            writer.add_document(np.array([1]))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def damaged_index(at, value):
    return GOLDEN_IDX[:at] + value + GOLDEN_IDX[at + len(value) :]


@pytest.mark.parametrize(
    ("index", "tokens", "message"),
    [
        (GOLDEN_IDX[:-1], GOLDEN_BIN, r"data\.idx is truncated"),
        (GOLDEN_IDX[:20], GOLDEN_BIN, r"data\.idx is truncated"),
        (GOLDEN_IDX + b"\0", GOLDEN_BIN, r"data\.idx is damaged"),
        (b"", GOLDEN_BIN, "magic"),
        (b"X" + GOLDEN_IDX[1:], GOLDEN_BIN, "magic"),
        (damaged_index(9, b"\x02"), GOLDEN_BIN, "has version 2, must be 1"),
        (damaged_index(17, b"\x06"), GOLDEN_BIN, "type code 6"),
        (damaged_index(18, b"\xff" * 8), GOLDEN_BIN, r"data\.idx is truncated"),
        (damaged_index(34, b"\xff" * 4), GOLDEN_BIN, "negative length"),
        (damaged_index(58, b"\x07"), GOLDEN_BIN, "pointers do not follow"),
        (damaged_index(90, b"\x03"), GOLDEN_BIN, "documents do not cover"),
        (damaged_index(106, b"\x05"), GOLDEN_BIN, "documents do not cover"),
        (GOLDEN_IDX, GOLDEN_BIN[:-1], r"data\.bin is truncated"),
        (GOLDEN_IDX, b"", r"data\.bin is truncated"),
        (GOLDEN_IDX, GOLDEN_BIN + b"\0", r"data\.bin is damaged"),
        (GOLDEN_IDX, None, r"data\.bin does not exist"),
        (None, GOLDEN_BIN, r"data\.idx does not exist"),
    ],
)
def test_a_damaged_pair_is_refused(index, tokens, message, tmp_path):
    for ending, content in ((".idx", index), (".bin", tokens)):
        if content is not None:
            (tmp_path / f"data{ending}").write_bytes(content)
    with pytest.raises(DataError, match=message):
        IndexedFile(tmp_path / "data")
