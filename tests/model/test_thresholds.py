"""The density dial of a model: checked, saved, and used by everything that calls it."""

import json

import pytest
import torch

from remoe.errors import ConfigError
from remoe.model.thresholds import set_thresholds
from remoe.model.weights import load_model, save_model
from remoe.moe import dial


def active(model, tokens_BS):
    return [int(routing.routing_map_TE.sum()) for routing in model(tokens_BS).routings if routing is not None]


def test_one_number_is_for_all_layers(build, tokens_BS):
    model = build()
    trained = active(model, tokens_BS)
    set_thresholds(model, 0.5)
    assert dial.thresholds(model) == [0.5, 0.5]
    assert all(now < before for now, before in zip(active(model, tokens_BS), trained, strict=True))


def test_a_layer_that_lets_nothing_through_is_skipped(build, tokens_BS):
    model = build()
    set_thresholds(model, [1e9, 0.0])
    assert active(model, tokens_BS)[0] == 0
    model.model.layers[0].mlp.experts.down_proj.data.fill_(float("nan"))  # none of it is read
    assert model(tokens_BS).logits.isfinite().all()


def test_thresholds_are_saved_with_the_model(build, tokens_BS, tmp_path):
    model = build()
    set_thresholds(model, [0.25, -0.125])
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config.thresholds == [0.25, -0.125]
    assert torch.equal(loaded(tokens_BS).logits, model(tokens_BS).logits)


def test_a_model_saved_before_there_was_a_dial_has_it_at_0(build, tmp_path):
    save_model(build(), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["thresholds"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert dial.thresholds(load_model(tmp_path)) == [0.0, 0.0]


def test_text_is_generated_with_the_thresholds(build, tokens_BS):
    model = build()
    trained = model.generate(tokens_BS, 8)
    set_thresholds(model, 1.0)
    tokens = model.generate(tokens_BS, 8)
    assert not torch.equal(tokens, trained)
    assert torch.equal(tokens[:, -1], model(tokens[:, :-1]).logits[:, -1].argmax(-1))


@pytest.mark.parametrize(
    ("settings", "thresholds", "message"),
    [
        ({}, [0.1, 0.2, 0.3], "model.thresholds has 3 numbers, must be one number, or a list with one for each of 2"),
        ({}, float("nan"), "model.thresholds is nan, must be finite"),
        ({"router": "topk"}, 0.1, "model.thresholds is 0.1, must be 0 without a ReLU gate"),
        ({"moe_layers": "none"}, 0.1, "must be 0 without a ReLU gate"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(build, settings, thresholds, message):
    model = build(**settings)
    with pytest.raises(ConfigError, match=message):
        set_thresholds(model, thresholds)
    with pytest.raises(ConfigError, match=message):
        build(**settings, thresholds=thresholds)


def test_zero_is_allowed_everywhere(build):
    model = build(router="topk")
    set_thresholds(model, 0.0)
    assert model.config.thresholds == 0.0
