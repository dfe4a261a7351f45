"""`remoe density` and `--threshold` on a tiny run."""

import json
import shutil

import pytest

from remoe.training import load

FEW = ("--calibration-sequences", 2, "--sequences", 2)


@pytest.fixture
def own_run(run_folder, tmp_path):
    return shutil.copytree(run_folder, tmp_path / "runs" / "seen")


def test_the_curve_is_printed_and_kept_with_the_run(remoe, own_run):
    outcome = remoe("density", own_run, "--targets", "0.5,2", *FEW)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["thresholds", "active", "experts", "loss", "minus", "trained"]
    assert sum(line.startswith("per layer") for line in lines) == 2
    assert any(line.startswith("trained") and line.endswith("+0.0000") for line in lines)
    assert "layer 1 of" in outcome.err
    kept = json.loads((own_run / "density.json").read_text())
    assert len(kept["points"]) == 5


def test_json_is_the_curve_alone(remoe, own_run):
    points = json.loads(remoe("density", own_run, "--targets", "2", *FEW, "--json").out)["points"]
    assert [point["target"] for point in points if point["kind"] == "per_layer"] == [2.0]


def test_a_chosen_density_is_saved(remoe, own_run, tmp_path):
    assert remoe("density", own_run, "--targets", "2", "--choose", "0.25", "--to", "sparser", *FEW).code == 0
    assert len(set(load(tmp_path / "sparser").config.thresholds)) > 1
    assert remoe("generate", "sparser", "--prompt", "Line", "--max-new-tokens", 4).code == 0


def test_generate_takes_one_number_for_all_layers(remoe, own_run):
    asked = ("generate", own_run, "--prompt", "Line", "--max-new-tokens", 12, "--temperature", 0)
    assert remoe(*asked, "--threshold", 0).out == remoe(*asked).out
    outcome = remoe(*asked, "--threshold", "nan")
    assert outcome.code == 2
    assert "model.thresholds is nan, must be finite" in outcome.err


def test_eval_takes_one_number_for_all_layers(remoe, own_run):
    asked = ("eval", own_run, "--sequences", 2, "--json")
    scores = [json.loads(remoe(*asked, *more).out) for more in ((), ("--threshold", 0), ("--threshold", 99))]
    assert scores[0] == scores[1]
    assert scores[2]["active_experts"] == 0
    assert scores[2]["total"]["loss"] != scores[0]["total"]["loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--choose", "0.5"), "--choose and --to go together"),
        (("--targets", "some"), "--targets is 'some', must be numbers such as 0.5,1,1.5"),
        (("--targets", "99"), "a target is 99.0, must be between 0 and the layer's"),
        (("--choose", "0.5", "--to", "runs"), "--to is runs, which holds files, must be new or empty"),
    ],
)
def test_mistakes_are_told_in_one_line(remoe, own_run, arguments, message):
    outcome = remoe("density", own_run, *arguments, *FEW)
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err
