import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from remoe.data import IndexedFile, load_saved_tokenizer
from remoe.data.prepare import PrepareConfig, prepare
from remoe.errors import DataError

TEXTS = [f"Document {i} " + "talks of this and that. " * (1 + i % 7) for i in range(300)]
DOMAINS = ["news", "code", "law"] * 100
RESULTS = (".bin", ".idx", ".domains.json", ".manifest.json")


def quiet(**settings):
    return PrepareConfig(**{"show_progress": False, "chunk_bytes": 1000} | settings)


def result(prefix):
    return [prefix.with_name(prefix.name + ending).read_bytes() for ending in RESULTS]


@pytest.fixture
def rows(write_rows):
    return write_rows("rows.jsonl", TEXTS, DOMAINS)


def test_the_dataset_holds_every_document_its_domain_and_the_counts(rows, tmp_path):
    manifest = prepare([rows], "bytes", tmp_path / "out", quiet())
    file, tokenizer = IndexedFile(tmp_path / "out"), load_saved_tokenizer(tmp_path / "out.tokenizer")
    assert [tokenizer.decode(file.document(i)) for i in range(300)] == TEXTS
    domains = json.loads((tmp_path / "out.domains.json").read_text())
    assert [domains["domains"][i] for i in domains["domain_of_document"]] == DOMAINS
    assert manifest["documents"] == 300
    assert manifest["tokens"] == sum(map(len, TEXTS)) + 300 == len(file.tokens)
    assert sum(manifest["tokens_per_domain"].values()) == manifest["tokens"]
    assert manifest["tokenizer"]["name"] == "bytes"
    assert not (tmp_path / "out.partial").exists()


def test_documents_end_with_eod_only_if_asked(rows, tmp_path):
    prepare([rows], "bytes", tmp_path / "with", quiet())
    prepare([rows], "bytes", tmp_path / "without", quiet(append_eod=False))
    assert IndexedFile(tmp_path / "with").document(0)[-1] == 256
    assert 256 not in IndexedFile(tmp_path / "without").tokens


def test_neither_workers_nor_chunks_change_a_byte(rows, tmp_path):
    prepare([rows], "bytes", tmp_path / "one", quiet())
    prepare([rows], "bytes", tmp_path / "two", quiet(workers=2))
    prepare([rows], "bytes", tmp_path / "whole", quiet(chunk_bytes=1 << 20))
    assert result(tmp_path / "one") == result(tmp_path / "two") == result(tmp_path / "whole")


def test_several_inputs_follow_each_other_and_name_their_domains(write_rows, tmp_path):
    paths = [write_rows("wiki.jsonl", ["one", "two"]), write_rows("code.v2.jsonl", ["three"])]
    manifest = prepare(paths, "bytes", tmp_path / "out", quiet())
    assert manifest["tokens_per_domain"] == {"wiki": 8, "code": 6}


def test_an_existing_dataset_is_replaced_only_if_asked(rows, write_rows, tmp_path):
    other = write_rows("other.jsonl", ["short"])
    prepare([rows], "bytes", tmp_path / "out", quiet())
    before = result(tmp_path / "out")
    with pytest.raises(DataError, match=r"out\.idx exists; choose another output, or .* --overwrite"):
        prepare([other], "bytes", tmp_path / "out", quiet())
    assert result(tmp_path / "out") == before
    prepare([other], "characters", tmp_path / "out", quiet(overwrite=True))
    assert IndexedFile(tmp_path / "out").num_documents == 1
    assert load_saved_tokenizer(tmp_path / "out.tokenizer").name == "characters"


def test_a_refused_line_leaves_no_dataset_and_keeps_what_was_there(rows, tmp_path):
    prepare([rows], "bytes", tmp_path / "out", quiet())
    before = result(tmp_path / "out")
    rows.write_text(rows.read_text() + '{"text": 1}\n')
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"rows\.jsonl:301: key 'text' holds a JSON number"):
            prepare([rows], "bytes", tmp_path / "out", quiet(overwrite=True, workers=workers))
        with pytest.raises(DataError, match=r"rows\.jsonl:301"):
            prepare([rows], "bytes", tmp_path / "new", quiet(chunk_bytes=1 << 20, workers=workers))
    assert result(tmp_path / "out") == before
    assert not list(tmp_path.glob("new*"))


def test_skipped_lines_are_counted_and_listed(rows, tmp_path):
    lines = rows.read_text().splitlines()
    lines[4], lines[250] = "oops", "[]"
    rows.write_text("\n".join(lines))
    manifest = prepare([rows], "bytes", tmp_path / "out", quiet(on_bad_line="skip", workers=2))
    assert (manifest["documents"], manifest["skipped_lines"]) == (298, 2)
    skipped = (tmp_path / "out.skipped.txt").read_text().splitlines()
    assert [line.removeprefix(f"{rows}:").partition(":")[0] for line in skipped] == ["5", "251"]


def test_empty_texts_are_counted_and_left_out(write_rows, tmp_path):
    manifest = prepare([write_rows("a.jsonl", ["one", "", "two"])], "bytes", tmp_path / "out", quiet())
    assert (manifest["documents"], manifest["empty_texts"]) == (2, 1)
    with pytest.raises(DataError, match="holds no document with text"):
        prepare([write_rows("b.jsonl", ["", ""])], "bytes", tmp_path / "none", quiet())
    assert not (tmp_path / "none.idx").exists()


def test_a_missing_input_is_found_before_any_work(rows, tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist"):
        prepare([rows, tmp_path / "nowhere.txt"], "bytes", tmp_path / "out", quiet())
    with pytest.raises(DataError, match="there is no input"):
        prepare([], "bytes", tmp_path / "out", quiet())
    assert list(tmp_path.iterdir()) == [rows]


def test_an_output_that_cannot_be_written_is_one_message(rows, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*file/out"):
        prepare([rows], "bytes", tmp_path / "file" / "out", quiet())


def test_progress_is_plain_lines_where_there_is_no_terminal(rows, tmp_path, capsys):
    prepare([rows], "bytes", tmp_path / "out", quiet(show_progress=True))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("tokenize: 100 %, 300 documents")


def start(rows, prefix, workers, tmp_path):
    """`prepare` in a process group of its own."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom remoe.data.prepare import PrepareConfig, prepare\n"
        "if __name__ == '__main__':\n"
        "    config = PrepareConfig(workers=int(sys.argv[3]), chunk_bytes=1, show_progress=False)\n"
        "    prepare([sys.argv[1]], 'bytes', sys.argv[2], config)\n"
    )
    script = tmp_path / "run_prepare.py"
    script.write_text(program)
    return subprocess.Popen([sys.executable, script, rows, prefix, str(workers)], start_new_session=True)


def running_in_group(group):
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            found.append(int(status.parent.name))
    return found


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux' /proc to see the processes left")
@pytest.mark.parametrize(("workers", "parts"), [(1, 1), (2, 20), (2, 60)])
def test_a_killed_run_goes_on_to_the_same_bytes_and_leaves_no_process(workers, parts, rows, tmp_path):
    prepare([rows], "bytes", tmp_path / "whole", quiet())
    prefix = tmp_path / "killed"
    process = start(rows, prefix, workers, tmp_path)
    try:
        assert wait_until(
            lambda: len(list(tmp_path.glob("killed.partial/*.npz"))) >= parts or process.poll() is not None
        )
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert wait_until(lambda: not running_in_group(process.pid))
    finally:
        for pid in running_in_group(process.pid):
            os.kill(pid, signal.SIGKILL)
    if (tmp_path / "killed.idx").exists():
        pytest.skip("this machine was too busy to stop the run in time")
    assert len(list(tmp_path.glob("killed.partial/*.npz"))) >= parts
    prepare([rows], "bytes", prefix, quiet(workers=2, chunk_bytes=1))
    assert result(prefix) == result(tmp_path / "whole")
    assert not (tmp_path / "killed.partial").exists()


def test_a_second_run_tokenises_only_what_is_missing(rows, tmp_path, monkeypatch):
    from remoe.data import prepare as module

    tokenize, done, limit = module.tokenize, [], 30

    def counting_tokenize(task, tokenizer):
        if len(done) == limit:
            raise KeyboardInterrupt
        done.append(task.to.name)
        return tokenize(task, tokenizer)

    monkeypatch.setattr(module, "tokenize", counting_tokenize)
    with pytest.raises(KeyboardInterrupt):
        prepare([rows], "bytes", tmp_path / "out", quiet())
    limit = None
    prepare([rows], "bytes", tmp_path / "out", quiet())
    assert len(done) == len(set(done)) > 30
    monkeypatch.undo()
    prepare([rows], "bytes", tmp_path / "whole", quiet())
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_work_of_other_settings_or_text_is_not_taken_up(rows, tmp_path, monkeypatch):
    from remoe.data import prepare as module

    def stop_before_the_end(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "move_dataset", stop_before_the_end)
    with pytest.raises(KeyboardInterrupt):
        prepare([rows], "bytes", tmp_path / "out", quiet())
    monkeypatch.undo()
    text = rows.read_text()
    rows.write_text(text.replace("Document 7 ", "Document X "))
    prepare([rows], "bytes", tmp_path / "out", quiet(append_eod=False))
    prepare([rows], "bytes", tmp_path / "fresh", quiet(append_eod=False))
    assert result(tmp_path / "out") == result(tmp_path / "fresh")


@pytest.mark.parametrize("stop_at", range(1, 8))
def test_a_run_stopped_while_it_puts_the_dataset_in_place_can_be_repeated(stop_at, rows, tmp_path, monkeypatch):
    prepare([rows], "bytes", tmp_path / "whole", quiet())
    replace, calls = os.replace, []

    def stopping_replace(source, target):
        if Path(target).name.startswith("out."):
            calls.append(target)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
        return replace(source, target)

    monkeypatch.setattr(os, "replace", stopping_replace)
    try:
        prepare([rows], "bytes", tmp_path / "out", quiet())
    except KeyboardInterrupt:
        monkeypatch.undo()
        assert not (tmp_path / "out.idx").exists()
        prepare([rows], "bytes", tmp_path / "out", quiet())
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_a_run_stopped_while_it_tidied_up_counts_as_done(rows, tmp_path, monkeypatch):
    from remoe.data import prepare as module

    monkeypatch.setattr(module, "_remove_partial", lambda job: None)
    prepare([rows], "bytes", tmp_path / "out", quiet())
    before = result(tmp_path / "out")
    monkeypatch.undo()
    prepare([rows], "bytes", tmp_path / "out", quiet())
    assert result(tmp_path / "out") == before
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(DataError, match="exists"):
        prepare([rows], "bytes", tmp_path / "out", quiet())


def test_worker_processes_start_without_torch():
    program = "import sys, remoe.data.parts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
