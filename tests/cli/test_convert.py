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
