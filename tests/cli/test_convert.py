"""`remoe convert` on a tiny run."""

import json

import pytest


def test_what_was_converted_is_printed(remoe, tiny, tmp_path):
    remoe("train", "demo-topk", *tiny, "--set", "name=top", "--no-report")
    few = ("--calibration-sequences", 2, "--sequences", 2)
    outcome = remoe("convert", "runs/top", "--to", "relu", *few)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == "relu: native to native"
    assert lines[1].startswith("loss ")
    assert lines[3].startswith("MoE layer  active experts (k = 1)")
    again = json.loads(remoe("convert", "runs/top", "--to", "again", *few, "--json").out)
    assert f"{again['agreement']['loss_after']:.4f} after" in lines[1]
    assert remoe("convert", "runs/top", "--to", "relu", *few).code == 2


def test_a_relu_run_is_refused_in_one_line(remoe, run_folder, tmp_path):
    outcome = remoe("convert", run_folder, "--to", "back", "--router", "topk")
    assert outcome.code == 2
    assert "exact are only renormalised Top-K (Mixtral) and dense (Llama)" in outcome.err
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(("option", "value"), [("--router", ["topk"]), ("--sequences", [32]), ("--json", [])])
def test_options_that_a_megatron_checkpoint_leaves_no_use_for_are_refused(remoe, run_folder, tmp_path, option, value):
    outcome = remoe("convert", run_folder, "--from", "megatron", "--to", "new", option, *value)
    assert outcome.code == 2
    assert f"{option} does nothing with --from megatron, must be left out" in outcome.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("source", ["nowhere", "text.txt", "."])
def test_what_is_no_model_is_told_with_all_that_could_be_converted(remoe, tmp_path, source):
    (tmp_path / "text.txt").write_text("some text")
    outcome = remoe("convert", source, "--to", "new")
    assert outcome.code == 2
    kinds = "a run, a checkpoint, an export or a folder of transformers with its config.json"
    assert outcome.err.startswith(f"remoe: {source} is not {kinds}; `remoe runs` lists the runs")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "absent.txt"), "--data: absent.txt does not exist, must be a text, jsonl or parquet file"),
        (("--data", "."), "--data: . is a folder, must be a file"),
        (("--tokenizer", "absent"), "tokenizer 'absent' does not exist, must be bytes, "),
        (("--router", "rleu"), "--router is 'rleu', must be one of relu, topk; did you mean 'relu'?"),
    ],
)
def test_what_is_missing_is_told_before_the_weights_are_read(
    remoe, run_folder, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr("remoe.convert.checkpoint.load", lambda path: pytest.fail("weights were read"))
    outcome = remoe("convert", run_folder, "--to", "new", *options)
    assert outcome.code == 2
    assert outcome.err.startswith(f"remoe: {message}")
    assert not (tmp_path / "new").exists()


def test_a_folder_without_a_tokenizer_is_told_before_the_weights_are_read(remoe, tmp_path):
    (tmp_path / "olmoe").mkdir()
    (tmp_path / "olmoe" / "config.json").write_text('{"model_type": "olmoe"}')
    outcome = remoe("convert", "olmoe", "--to", "new")
    assert (outcome.code, outcome.err) == (2, "remoe: olmoe holds no tokenizer; name the model's with --tokenizer\n")
