"""The campaign of tools/fuzz_files.py, small, and what it found in large ones."""

import json
import os
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from tools import fuzz_files

from remoe.data.named_tokenizer import load_saved_tokenizer, load_tokenizer
from remoe.data.readers import ReadConfig, read_documents
from remoe.data.tokenizer import CARD
from remoe.errors import CheckpointError, DataError
from remoe.training.metrics import read_metrics


def test_no_damaged_file_ends_in_a_traceback_or_a_wrong_result(tmp_path):
    found = fuzz_files.campaign(len(fuzz_files.TARGETS) * 5, 7, tmp_path, sorted(fuzz_files.TARGETS))
    assert found["faults"] == {}
    assert found["files"] == len(fuzz_files.TARGETS) * 5
    assert all(found["outcomes"][outcome] for outcome in (fuzz_files.SAME, fuzz_files.READ, fuzz_files.REFUSED))


def test_a_token_that_was_changed_to_another_valid_one_is_found(tmp_path):
    fuzz_files.make_dataset(tmp_path / "set")
    path = tmp_path / "set" / "data.bin"
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"data.bin is damaged: it does not match the checksum in data.manifest.json"):
        fuzz_files.use_dataset(tmp_path / "set")


def test_a_dataset_from_before_there_were_checksums_opens(tmp_path):
    fuzz_files.make_dataset(tmp_path / "set")
    path = tmp_path / "set" / "data.manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    assert len(fuzz_files.use_dataset(tmp_path / "set")) == len(fuzz_files.rows())


def test_a_domain_that_is_infinite_is_damaged(tmp_path):
    fuzz_files.make_dataset(tmp_path / "set")
    path = tmp_path / "set" / "data.domains.json"
    path.write_text(path.read_text().replace("[0,", "[1e999,"))
    with pytest.raises(DataError, match=r"data.domains.json is damaged: it must hold"):
        fuzz_files.use_dataset(tmp_path / "set")


@pytest.mark.parametrize("change", [{"characters": 3}, {"words": [1]}, {"characters": None}])
def test_a_saved_vocabulary_that_is_no_text_is_damaged(tmp_path, change):
    (kind,) = change
    fuzz_files.make_tokenizer(kind)(tmp_path)
    card = json.loads((tmp_path / CARD).read_text()) | change
    (tmp_path / CARD).write_text(json.dumps(card))
    with pytest.raises(DataError, match=f"is damaged: it must hold the tokenizer's {kind}"):
        load_saved_tokenizer(tmp_path)


def test_two_tokens_with_one_id_are_refused(tmp_path):
    path = fuzz_files.write_bpe(tmp_path / "tokenizer.json")
    values = json.loads(path.read_text())
    values["model"]["vocab"]["e"] = values["model"]["vocab"]["t"]
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match="two of its tokens have the same id"):
        load_tokenizer(str(path))


@pytest.mark.parametrize(
    "line", ['{"step": "1"}', '{"step": null}', '{"step": 1, "valid_loss": "x"}', '{"step": true}']
)
def test_a_line_of_metrics_without_numbers_is_damaged(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:1 is damaged"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("where", [4, 40, -12, -200])
def test_a_parquet_file_that_was_cut_or_changed_is_one_error_or_the_rows(tmp_path: Path, where: int):
    fuzz_files.make_parquet(tmp_path)
    path = tmp_path / "corpus.parquet"
    os.truncate(path, path.stat().st_size + where if where < 0 else where)
    with pytest.raises(DataError, match="is damaged and cannot be read"):
        list(read_documents(path, ReadConfig()))


def test_text_in_a_binary_column_is_text(tmp_path):
    path = tmp_path / "corpus.parquet"
    table = pyarrow.table({"text": pyarrow.array(["é".encode()], pyarrow.binary()), "picture": [b"\xff\xd8"]})
    parquet.write_table(table, path)
    assert [document.text for document in read_documents(path, ReadConfig())] == ["é"]


def test_bytes_that_are_no_text_are_refused_as_text(tmp_path):
    path = tmp_path / "corpus.parquet"
    parquet.write_table(pyarrow.table({"text": [b"\xff\xd8"]}), path)
    with pytest.raises(DataError, match="'text' holds a JSON null, must be a string"):
        list(read_documents(path, ReadConfig()))


def test_a_parquet_file_with_fewer_rows_than_it_announces_is_damaged(tmp_path, monkeypatch):
    fuzz_files.make_parquet(tmp_path)
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda *_, **__: iter(()))
    with pytest.raises(DataError, match=r"is damaged: it announces 30 rows more than it holds"):
        list(read_documents(tmp_path / "corpus.parquet", ReadConfig()))


def test_checksums_of_parquet_pages_are_checked(tmp_path):
    path = tmp_path / "corpus.parquet"
    table = pyarrow.table({"text": [f"text {i}" for i in range(100)]})
    parquet.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"text 50", b"text 05"))
    with pytest.raises(DataError, match="is damaged and cannot be read"):
        list(read_documents(path, ReadConfig()))
