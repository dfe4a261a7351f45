"""The curve of the density dial on a tiny run: what is measured, on what, and what is saved."""

import dataclasses
import json
import shutil

import pytest
import torch

from remoe.config import from_dict
from remoe.data.chat import load_template, save_template
from remoe.errors import CheckpointError, ConfigError, DataError
from remoe.eval.density import DensityConfig, load_curve, measure_density, save_at, save_curve
from remoe.eval.held_out import open_model_and_text
from remoe.model.thresholds import set_thresholds
from remoe.model.weights import save_model
from remoe.moe import dial
from remoe.training import Run, TrainConfig, load, train
from remoe.training.saved import chat_template_of

SETTINGS = DensityConfig(
    targets=(1.0, 3.0), calibration_sequences=6, sequences=10, batch_size=4, device="cpu"
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    def build(name="run", **model) -> Run:
        folder = tmp_path_factory.mktemp(name)
        text = folder / "text.txt"
        text.write_text("\n\n".join("the cat sat on the mat " * 8 + str(i) for i in range(60)), encoding="utf-8")
        small = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 16}
        values = {
            "model": small | {"num_experts": 4, "init_std": 0.1} | model,
            "data": {"train": str(text), "sequence_length": 16, "cache": str(folder / "cache"),
                     "validation_fraction": 0.2},
            "optimizer": {"lr": 0.01},
            "train": {"steps": 4, "batch_size": 4, "validation_batches": 2, "device": "cpu"},
        }  # fmt: skip
        return train(from_dict(TrainConfig, values), root=folder / "runs")

    return build


@pytest.fixture(scope="module")
def run(trained) -> Run:
    return trained()


@pytest.fixture(scope="module")
def curve(run):
    return measure_density(run.path, config=SETTINGS)


def test_each_target_is_measured_both_ways_beside_the_model_as_it_is(curve):
    points = sorted((point.kind, point.target or 0.0) for point in curve.points)
    assert points == [
        ("one_number", 1.0), ("one_number", 3.0), ("per_layer", 1.0), ("per_layer", 3.0), ("trained", 0.0)
    ]  # fmt: skip
    assert curve.trained.thresholds == (0.0, 0.0)
    actives = [point.active_experts for point in curve.points]
    assert actives == sorted(actives)
    assert (curve.calibration_tokens, curve.tokens) == (6 * 16, 10 * 16)


def test_thresholds_give_the_target_on_the_text_that_chose_them(run, curve):
    opened = open_model_and_text(run.path, None, "cpu")
    calibration = list(opened.sequences(6, 6))
    for target in SETTINGS.targets:
        set_thresholds(opened.model, curve.at(target).thresholds)
        assert opened.evaluate(calibration)["active_experts"] == pytest.approx(target, abs=1 / (6 * 16))


def test_losses_are_those_of_text_that_chose_nothing(run, curve):
    opened = open_model_and_text(run.path, None, "cpu")
    rest = list(opened.sequences(16, 1))[6:]
    for point in curve.points:
        set_thresholds(opened.model, point.thresholds)
        result = opened.evaluate(rest)
        assert point.loss == pytest.approx(result["loss"], rel=1e-6)
        assert point.active_experts == pytest.approx(result["active_experts"])


def test_default_targets_are_shares_of_what_the_model_uses(run):
    curve = measure_density(run.path, config=DensityConfig(calibration_sequences=4, sequences=4, device="cpu"))
    targets = sorted({point.target for point in curve.points if point.target is not None})
    assert targets[0] == pytest.approx(0.25 / 0.4 * targets[1], abs=0.01)
    assert targets[0] < curve.trained.active_experts
    assert targets[-1] <= 4


def test_a_saved_model_has_the_chosen_thresholds(run, curve, tmp_path):
    save_at(curve.at(1.0), run.path, tmp_path / "sparser")
    model = load(tmp_path / "sparser")
    assert tuple(dial.thresholds(model)) == curve.at(1.0).thresholds
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), load(run.path).parameters(), strict=True))
    with pytest.raises(ConfigError, match="must be new or empty"):
        save_at(curve.at(1.0), run.path, tmp_path / "sparser")


def test_a_model_with_thresholds_is_measured_from_there(run, tmp_path):
    model = load(run.path)
    set_thresholds(model, 0.01)
    save_model(model, tmp_path)
    own = Run.open(run.path).config.data
    text = dataclasses.replace(own, validation=own.train)
    assert measure_density(tmp_path, text, SETTINGS).trained.thresholds == (0.01, 0.01)


def test_a_saved_density_keeps_the_template_and_length_but_not_the_figures(run, curve, tmp_path):
    tuned = shutil.copytree(run.path, tmp_path / "tuned")
    save_template(load_template("chat"), tuned / "tokenizer")
    save_at(curve.at(1.0), tuned, tmp_path / "sparser")
    save_at(curve.at(1.0), tmp_path / "sparser", tmp_path / "again")
    for folder in (tmp_path / "sparser", tmp_path / "again"):
        assert chat_template_of(folder).source == load_template("chat").source
        settings = json.loads((folder / "config.json").read_text())
        assert settings["max_position_embeddings"] == 16
        assert settings["sparsity_coef"] == run.metrics()[-1]["sparsity_coef"]
    card = (tmp_path / "sparser" / "README.md").read_text()
    assert "# run" in card
    assert "## Measured" not in card


def test_a_curve_is_read_as_it_was_written(curve, tmp_path):
    save_curve(curve, tmp_path / "a" / "density.json")
    assert load_curve(tmp_path / "a" / "density.json") == curve
    (tmp_path / "other.json").write_text('{"points": 3}')
    with pytest.raises(CheckpointError, match="is not a density curve"):
        load_curve(tmp_path / "other.json")


def test_recurrent_relu_routers_have_a_curve_too(trained):
    run = trained("recurrent", router={"name": "recurrent_relu", "state_size": 4})
    curve = measure_density(run.path, config=SETTINGS)
    assert curve.at(1.0).active_experts < curve.at(3.0).active_experts


@pytest.mark.parametrize(
    ("model", "settings", "error", "message"),
    [
        ({"router": "topk"}, {}, ConfigError, "the model is topk, must have ReLU gates"),
        ({"moe_layers": "none"}, {}, ConfigError, "the model is dense, must have ReLU gates"),
        ({}, {"targets": (5.0,)}, ConfigError, "a target is 5.0, must be between 0 and the layer's 4 experts"),
        ({}, {"calibration_sequences": 5000}, DataError, "must have more than the 5000 that choose thresholds"),
    ],
)
def test_what_cannot_be_measured_is_refused(trained, run, model, settings, error, message):
    path = trained("other", **model).path if model else run.path
    with pytest.raises(error, match=message):
        measure_density(path, config=DensityConfig(device="cpu", **settings))
