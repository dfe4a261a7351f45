import gzip
import json
import lzma
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe.data.readers import DOCUMENT_BYTES, ReadConfig, iter_chunks, parse_chunk, read_documents
from remoe.errors import DataError

ROWS = [{"text": f"Text {i} ü", "meta": {"pile_set_name": "even" if i % 2 == 0 else "odd"}} for i in range(50)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
SKIP = ReadConfig(on_bad_line="skip")


def zstd(content):
    return pytest.importorskip("zstandard").compress(content)


COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


def read(path, **settings):
    return list(read_documents(path, ReadConfig(**settings)))


@pytest.mark.parametrize("ending", ["", ".gz", ".xz", ".zst"])
def test_rows_are_read_with_their_domains_from_each_compression(ending, tmp_path):
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(COMPRESS.get(ending, bytes)(JSONL))
    documents = read(path)
    assert [document.text for document in documents] == [row["text"] for row in ROWS]
    assert [document.domain for document in documents[:2]] == ["even", "odd"]


def test_parquet_rows_read_as_jsonl_does(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet", row_group_size=7)
    (tmp_path / "rows.jsonl").write_bytes(JSONL)
    assert read(tmp_path / "rows.parquet") == read(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_a_file_cut_off_in_compression_is_refused(ending, tmp_path):
    path = tmp_path / f"rows.jsonl{ending}"
    content = COMPRESS[ending](os.urandom(300_000))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"rows\.jsonl\..* is damaged and cannot be decompressed"):
        list(iter_chunks(path))


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst", ".parquet"])
def test_a_file_that_is_not_what_its_name_says_is_refused(ending, tmp_path):
    pytest.importorskip({".zst": "zstandard", ".parquet": "pyarrow"}.get(ending, "gzip"))
    path = tmp_path / f"rows{ending}"
    path.write_text("just some text, longer than any header of a compressed file would be" * 4)
    with pytest.raises(DataError, match="is damaged and cannot be"):
        list(iter_chunks(path))


def test_several_frames_of_zstd_follow_each_other(tmp_path):
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(zstd(JSONL) + zstd(JSONL))
    assert len(read(path)) == 100


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "open', "not valid JSON"),
        (b"[1, 2]", "holds a JSON array, must be an object"),
        (b'{"content": "x"}', "has no key 'text'; its keys are 'content'"),
        (b'{"text": 3}', "holds a JSON number, must be a string"),
        (b'{"text": null}', "holds a JSON null, must be a string"),
        (b'{"text": "\xff"}', "not UTF-8 text .byte 0xff at offset 10"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_a_bad_row_is_refused_or_skipped_with_file_and_line(line, reason, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "also good"}\n')
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*{reason}"):
        read(path)
    (chunk,) = iter_chunks(path)
    parsed = parse_chunk(chunk, SKIP)
    assert [document.text for document in parsed.documents] == ["good", "also good"]
    assert len(parsed.problems) == 1


def test_line_numbers_go_on_from_chunk_to_chunk(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(JSONL + b"oops\n")
    problems = [problem for chunk in iter_chunks(path, 200) for problem in parse_chunk(chunk, SKIP).problems]
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}:51: ")


def test_a_named_domain_field_must_be_there(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "a", "source": {"kind": "web"}}\n{"body": "b"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: has no domain in 'source\.kind'"):
        read(path, text_key="body", domain_field="source.kind")
    assert [document.domain for document in read(path, text_key="body", default_domain="none")] == ["none", "none"]


def test_a_key_that_no_row_has_is_to_be_named_and_not_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "1", "content": "some words"}\n' * 3)
    with pytest.raises(DataError) as caught:
        read(path)
    fix = "name the key of the text: --key content (prepare), --set data.text_field=content (train)"
    assert str(caught.value) == f"{path}:1: has no key 'text'; its keys are 'id', 'content'; {fix}"
    with pytest.raises(
        DataError, match=r"its keys are 'id', 'content'; name another key: .*data\.domain_field=KEY \(train\)$"
    ):
        read(path, text_key="content", domain_field="kind")


def test_a_key_that_some_rows_lack_can_be_skipped_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "a"}\n{"text": "b"}\n')
    with pytest.raises(
        DataError, match=r"--key body .*; or skip such lines with --on-bad-line skip \(prepare\) or --set"
    ):
        read(path)


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("a.csv", r'pandas\.read_csv\("a\.csv"\)'),
        ("a.TSV.gz", r'sep="\\t"'),
        ("a.pdf", "pdftotext a.pdf a.pdf.txt"),
        ("a.html", "pandoc a.html"),
        ("a.zip", "unzip a.zip"),
    ],
)
def test_other_formats_are_refused_with_a_way_to_convert_them(name, fix, tmp_path):
    (tmp_path / name).write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=f"must be plain text .*jsonl or parquet.*{fix}"):
        read(tmp_path / name)


def test_a_json_file_may_hold_one_object_a_line_and_no_list(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(JSONL)
    assert len(read(path)) == len(ROWS)
    path.write_text(json.dumps(ROWS, indent=1))
    with pytest.raises(DataError, match=r"one object a line; convert it: jq -c '\.\[\]' a\.json > a\.jsonl"):
        read(path)


def test_broken_lines_of_a_text_file_are_named_or_left_out(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(b"one\rone\ntwo \xe9\nthree\n")  # \r ends no line here, as in the count of lines
    with pytest.raises(DataError, match=r"notes\.txt:2: not UTF-8"):
        read(path)
    assert read(path, on_bad_line="skip")[0].text == "one\rone\nthree\n"


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfword")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "word"}')
    assert read(tmp_path / "a.txt")[0].text == read(tmp_path / "a.jsonl")[0].text == "word"


@pytest.mark.parametrize("name", ["missing.txt", "empty.jsonl", "folder"])
def test_a_missing_empty_or_wrong_file_is_one_message(name, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=f"{name} (does not exist|is empty|is a folder), must"):
        read(tmp_path / name)


def test_a_long_text_is_cut_at_paragraph_ends(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Paragraph {i} of many words.\n\n" for i in range(9000)))
    texts = [document.text for document in read(path)]
    assert len(texts) == 5
    assert all(text.startswith("Paragraph") and text.endswith("words.\n\n") for text in texts)
    assert "".join(texts) == path.read_text()


@given(st.text(st.sampled_from("aé世\n"), min_size=1, max_size=50), st.integers(2000, 9000))
@settings(max_examples=20, deadline=None)
def test_no_character_of_a_long_text_is_lost_or_broken(tmp_path_factory, pattern, repeats):
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_bytes((pattern * repeats).encode())
    documents = read(path)
    assert "".join(document.text for document in documents) == pattern * repeats
    assert all(len(document.text.encode()) <= DOCUMENT_BYTES for document in documents)


@pytest.mark.parametrize("chunk_bytes", [1, 100, 1000])
def test_documents_do_not_depend_on_the_chunks(chunk_bytes, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(JSONL)
    chunks = list(iter_chunks(path, chunk_bytes))
    documents = [document for chunk in chunks for document in parse_chunk(chunk, SKIP).documents]
    assert documents == read(path)
    assert chunks[-1].position == len(JSONL)
