"""From a run's folder to what the report knows of it."""

import shutil

import numpy as np
import pytest

from remoe.analysis import write_report
from remoe.analysis.examine import document_starts, examine, examine_all, pieces
from remoe.data import TokenDataset, load_tokenizer
from remoe.errors import CheckpointError, DataError
from remoe.training import Run

pytestmark = pytest.mark.xdist_group("report")  # the runs are trained once


@pytest.fixture(scope="module")
def examined(trained_runs):
    return examine_all(trained_runs)


def test_a_routed_run_is_counted_over_its_validation_text(examined):
    relu, topk, dense = examined
    assert [run.router for run in examined] == ["relu", "topk", "dense"]
    assert dense.counts is None
    assert relu.counts.domains == topk.counts.domains == ("code", "prose")
    assert relu.counts.num_tokens == topk.counts.num_tokens > 1000
    assert (relu.counts.occurrences_U == topk.counts.occurrences_U).all()
    assert topk.counts.load_LDE.sum() == topk.counts.num_tokens * 3


def test_counts_agree_with_the_validation_of_the_trainer(examined):
    topk = examined[1]
    assert topk.counts.tokens_by_active_LA.tolist() == [[0, topk.counts.num_tokens, 0, 0, 0]] * 3
    assert topk.metrics.last("active_experts") == 1.0


def test_passages_and_generated_text_come_from_each_domain(examined):
    relu, _, dense = examined
    assert [passage.domain for passage in relu.passages] == ["code", "prose"]
    assert "".join(relu.passages[0].tokens).startswith("def f")
    assert relu.passages[0].active_TL.shape == (len(relu.passages[0].tokens), 3)
    assert dense.passages == ()
    assert [generation.domain for generation in dense.generations] == ["code", "prose"]
    assert all(generation.prompt and generation.continuation for generation in dense.generations)


def test_examining_twice_finds_the_same(examined, trained_runs):
    again = examine(trained_runs[0], {})
    assert again.generations == examined[0].generations
    assert np.array_equal(again.counts.load_LDE, examined[0].counts.load_LDE)


def test_a_run_whose_text_now_has_another_tokenizer_is_refused(trained_runs, tmp_path):
    copy = shutil.copytree(trained_runs[0], tmp_path / "run")
    load_tokenizer("characters", [Run.open(copy).path / "config.yaml"]).save(copy / "tokenizer")
    with pytest.raises(DataError, match="was trained with tokenizer 'characters'"):
        examine(copy, {})


def test_a_run_without_a_logged_step_is_refused(trained_runs, tmp_path):
    copy = shutil.copytree(trained_runs[0], tmp_path / "run")
    (copy / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="has logged no step yet"):
        examine(copy, {})


def test_each_domain_shows_its_first_long_document_or_else_its_longest():
    documents = [np.full(20, 1), np.full(50, 2), np.full(60, 3), np.full(17, 4), np.full(18, 5), np.full(3, 6)]
    dataset = TokenDataset.from_documents(documents, 10, ["a", "a", "a", "b", "b", "tiny"])
    starts = [(name, int(ids[0]), len(ids)) for name, ids in document_starts(dataset, 40)]
    assert starts == [("a", 2, 40), ("b", 5, 18)]


def test_a_character_of_several_tokens_stands_at_its_last_one():
    tokenizer = load_tokenizer("bytes")
    ids = [*tokenizer.encode("a\né€").tolist(), tokenizer.eod, 0xFF, ord("b")]
    assert pieces(tokenizer, ids) == ["a", "\n", "", "é", "", "", "€", "<eod>", "", "�b"]


def test_a_run_without_checkpoints_is_known_by_its_log(trained_runs, tmp_path):
    copy = shutil.copytree(trained_runs[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "tokenizer"))
    record, whole = examine(copy, {}), examine(trained_runs[0], {})
    assert record.router == "relu"
    assert record.counts is None
    assert (record.metrics, record.total_parameters) == (whole.metrics, whole.total_parameters)
    page = write_report([copy], tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'id="stages"' in page
    assert 'id="load-map"' not in page
