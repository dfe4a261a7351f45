import json

import pytest
import typer
from typer.testing import CliRunner

from remoe.cli.prepare import prepare_command
from remoe.data import IndexedFile
from remoe.errors import DataError


@pytest.fixture
def remoe_prepare():
    app = typer.Typer()
    app.command()(prepare_command)

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": f"text {i}", "kind": "ab"[i % 2]}) + "\n" for i in range(10)))
    return path


def test_it_writes_the_dataset_and_says_what_is_in_it(remoe_prepare, rows, tmp_path):
    options = ("--key", "body", "--domain-field", "kind", "--workers", 1, "--no-append-eod")
    result = remoe_prepare(rows, "--tokenizer", "bytes", "--output", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "60 tokens in 10 documents" in result.output
    assert IndexedFile(tmp_path / "out").document(3).tobytes() == "text 3".encode("utf-16-le")
    assert json.loads((tmp_path / "out.domains.json").read_text())["domains"] == ["a", "b"]


def test_skipped_lines_are_told(remoe_prepare, rows, tmp_path):
    rows.write_text(rows.read_text() + "oops\n")
    options = ("--key", "body", "--workers", 1, "--on-bad-line", "skip")
    result = remoe_prepare(rows, "--tokenizer", "bytes", "--output", tmp_path / "out", *options)
    assert "skipped 1 bad line, listed in" in result.output


def test_a_missing_file_is_not_taken_for_a_prefix(remoe_prepare, tmp_path):
    result = remoe_prepare(tmp_path / "no.jsonl", "--tokenizer", "bytes", "--output", tmp_path / "out")
    assert str(result.exception).endswith("no.jsonl does not exist, must be a text, jsonl or parquet file")


def test_an_existing_output_is_refused_without_overwrite(remoe_prepare, rows, tmp_path):
    arguments = (rows, "--tokenizer", "bytes", "--output", tmp_path / "out", "--key", "body", "--workers", 1)
    assert remoe_prepare(*arguments).exit_code == 0
    refused = remoe_prepare(*arguments)
    assert isinstance(refused.exception, DataError)
    assert "--overwrite" in str(refused.exception)
    assert remoe_prepare(*arguments, "--overwrite").exit_code == 0
