"""What a user may well write instead of what is meant: the message says what to write, or it is understood."""

import json
import shutil

import pytest

from remoe.cli.rows import as_table
from remoe.recipes.comparison import Row
from remoe.recipes.intervals import interval


@pytest.mark.parametrize(
    "command", ["generate seen", "export seen --to x", "eval seen", "runs diff seen seen", "analyze seen"]
)
def test_a_run_without_its_root_is_found_for_the_user(remoe, tmp_path, command):
    (tmp_path / "runs" / "seen").mkdir(parents=True)
    outcome = remoe(*command.split())
    assert outcome.code == 2
    assert outcome.err == "remoe: seen does not exist; did you mean runs/seen?\n"


def test_the_name_of_a_recipe_leads_to_show(remoe):
    assert "try: remoe recipes show demo-relu" in remoe("recipes", "demo-relu").err


def test_data_given_as_a_config_is_told_apart(remoe, tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"text": "words"}\n')
    for command in ("train", "plan"):
        outcome = remoe(command, "corpus.jsonl")
        assert outcome.code == 2
        fix = "try: remoe train demo-relu --set data.train=corpus.jsonl"
        assert outcome.err == f"remoe: corpus.jsonl is data, not a config; {fix}\n"


def test_missing_text_to_score_is_told_by_the_option(remoe, run_folder):
    outcome = remoe("eval", run_folder, "--data", "absent.txt", "--device", "cpu")
    assert outcome.code == 2
    assert outcome.err.startswith("remoe: --data: absent.txt does not exist, must be")


def test_analyze_takes_a_comparison_for_its_runs(remoe, run_folder, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "runs" / "c"
    for name in ("relu-seed0", "topk-seed0"):
        shutil.copytree(run_folder, folder / name)
    (folder / "comparison.json").write_text(json.dumps({"runs": {"c/topk-seed0": {}, "c/relu-seed0": {}}}))
    outcome = remoe("analyze", "runs/c")
    assert outcome.out == "report: runs/c/report.html\n"
    assert len(json.loads((folder / "analysis.json").read_text())["runs"]) == 2


def test_plan_says_what_its_memory_is_for(remoe):
    text = remoe("plan", "demo-relu", "--set", "train.micro_batch_size=8").out
    assert "memory: for micro-batches of 8 x 256 tokens in fp32, without activation checkpointing" in text
    assert "at start: in the first steps" in text


def test_a_comparisons_table_says_over_which_steps_its_numbers_are():
    row = Row("relu", interval([1.5]), None, 2.0, 1.1, 0.01, 1e12, 900.0)
    said = "losses: on validation text at the end; experts, balance and tokens/s: over the last quarter of the steps"
    assert said in as_table([row], num_seeds=1).splitlines()


def test_the_foot_of_a_comparisons_table_explains_inert_where_it_stands_in_it():
    row = Row("relu", interval([1.5]), None, 2.0, 1.1, 0.01, 1e12, 900.0)
    trained, inert = (as_table([row._replace(load_balancing_coef=coef)], num_seeds=2) for coef in (0.01, 0.0))
    assert "inert" not in trained
    assert "1.100 (inert)" in inert
    said = "(inert): that balance was measured, the router is not trained for it (load_balancing_coef is 0)"
    assert inert.splitlines()[-1] == said
