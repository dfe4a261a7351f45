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


def test_one_number_for_all_layers_is_saved_where_it_is_wished(remoe, own_run, tmp_path):
    outcome = remoe("density", own_run, "--choose", "0.25", "--to", "sparser", "--one-number", *FEW, "--json")
    (point,) = [point for point in json.loads(outcome.out)["points"] if point["kind"] == "one_number"]
    assert load(tmp_path / "sparser").config.thresholds == point["thresholds"]
    assert len(set(point["thresholds"])) == 1


@pytest.mark.heavy
def test_a_converted_model_of_transformers_has_the_same_dial(remoe, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.OlmoeConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, pad_token_id=256, bos_token_id=256,
        eos_token_id=256, initializer_range=0.2,
    )  # fmt: skip
    transformers.OlmoeForCausalLM(config).save_pretrained(tmp_path / "olmoe")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Line {i}, {i * i} is its square." for i in range(200)))
    text = ("--data", "text.txt", "--sequence-length", 32)
    asked = ("--tokenizer", "bytes", "--calibration-sequences", 24, "--sequences", 4)
    assert remoe("convert", "olmoe", "--to", "relu", *text, *asked).code == 0
    outcome = remoe("density", "relu", *text, *FEW, "--targets", "0.5,3", "--choose", "1", "--to", "sparser")
    assert outcome.code == 0, outcome.err
    assert sum(line.startswith("per layer") for line in outcome.out.splitlines()) == 3
    points = json.loads((tmp_path / "relu" / "density.json").read_text())["points"]
    (chosen,) = [point for point in points if (point["kind"], point["target"]) == ("per_layer", 1)]
    assert json.loads((tmp_path / "sparser" / "config.json").read_text())["thresholds"] == chosen["thresholds"]
    scores = json.loads(remoe("eval", "sparser", *text, "--sequences", 8, "--json").out)
    assert scores["active_experts"] == pytest.approx(1, abs=0.2)
    outcome = remoe("eval", "sparser", "--tasks", "piqa")
    assert outcome.code == 2
    assert "--model hf --model_args pretrained=sparser,trust_remote_code=True" in outcome.err


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
        (("--one-number",), "--one-number needs --choose: it says which thresholds are saved"),
        (("--sequence-length", "16"), "--sequence-length needs --data"),
        (("--device", "gpu"), "--device is 'gpu', must be auto, cpu, cuda or cuda:N"),
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
