"""YAML and --set keys to frozen dataclasses and back; one message for whatever does not fit."""

import dataclasses

import pytest

from remoe import ConfigError
from remoe.config import apply_overrides, describe_keys, from_dict, to_dict, to_yaml
from remoe.moe import MoEConfig
from remoe.recipes import read_config
from remoe.training.config import TrainConfig


def test_a_config_survives_the_trip_through_yaml(tmp_path):
    values = {"name": "a/b-1", "model": {"router": {"name": "topk", "renormalize": True}, "moe_layers": [0, 2]}}
    config = from_dict(TrainConfig, values)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert read_config(str(tmp_path / "c.yaml")) == config
    assert from_dict(TrainConfig, to_dict(config)) == config


def test_overrides_set_nested_keys_and_read_numbers_without_a_dot():
    values = apply_overrides(
        {"model": {"top_k": 1}}, ["model.top_k=2", "optimizer.lr=1e-3", "data.train=[a.txt, b.txt]"]
    )
    assert values == {"model": {"top_k": 2}, "optimizer": {"lr": 0.001}, "data": {"train": ["a.txt", "b.txt"]}}


def test_overrides_leave_the_given_values_alone():
    values = {"model": {"top_k": 1}}
    apply_overrides(values, ["model.top_k=2"])
    assert values == {"model": {"top_k": 1}}


def test_a_config_never_changes():
    with pytest.raises(dataclasses.FrozenInstanceError):
        from_dict(TrainConfig, {}).model.top_k = 3  # type: ignore[misc]


def test_every_key_has_a_default_and_a_line_of_help():
    keys = list(describe_keys(TrainConfig))
    assert {"model.top_k", "data.train", "optimizer.lr", "sparsity.init", "train.steps"} <= {key for key, _, _ in keys}
    assert all(help_line for _, _, help_line in keys)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"hiden_size": 3}}, "unknown key 'model.hiden_size'; did you mean 'hidden_size'?"),
        ({"steps": 5}, "unknown key 'steps'; did you mean 'train.steps'?"),
        ({"model": {"lr": 1}}, "unknown key 'model.lr'; did you mean 'optimizer.lr'?"),
        ({"modell": {}}, "unknown key 'modell'; did you mean 'model'?"),
        ({"model": {"hidden_size": "wide"}}, "model.hidden_size is 'wide', must be a whole number; e.g. 256"),
        ({"model": {"top_k": 9}}, "model.top_k is 9, must be between 1 and num_experts = 8"),
        ({"model": {"granularity": 3}}, "model.granularity is 3, must divide intermediate_size = 512"),
        ({"model": {"num_heads": 3}}, "model.num_heads is 3, must divide model.hidden_size = 256"),
        ({"model": {"num_kv_heads": 3}}, "model.num_kv_heads is 3, must divide model.num_heads = 4"),
        ({"model": {"moe_layers": [7]}}, "model.moe_layers names layer 7, must be between 0 and 3"),
        ({"train": {"micro_batch_size": 5}}, "train.micro_batch_size is 5, must divide train.batch_size = 16"),
        ({"sparsity": {"multiplier": 1.0}}, "sparsity.multiplier is 1.0, must be above 1"),
        ({"model": {"router": "rellu"}}, "model.router is 'rellu', must be one of cosine, expert_choice, "),
        ({"model": {"router": {"name": "relu", "epz": 1}}}, "model.router 'relu' has no option 'epz'"),
        ({"optimizer": {"schedule": "cosin"}}, "cosine, linear, wsd, constant; did you mean 'cosine'?"),
        ({"model": {"num_layers": 2.5}}, "model.num_layers is 2.5, must be a whole number; e.g. 4"),
        ({"model": {"hidden_size": None}}, "model.hidden_size is null, must be a whole number; e.g. 256"),
        ({"name": True}, "name is true, must be text; e.g. "),
        ({"model": {"vocab_size": "x"}}, "model.vocab_size is 'x', must be a whole number or null; e.g. 4"),
        ({"model": {"moe_layers": ["x"]}}, "moe_layers is ['x'], must be text or a list of whole numbers; e.g. all"),
        ({"model": {"router": {"name": "relu", "eps": "x"}}}, "router option eps is 'x', must be a number; e.g. 0.1"),
        ({"train": {"compile": "maybe"}}, "train.compile is 'maybe', must be true or false; e.g. false"),
        ({"train": {"sinks": [3]}}, "train.sinks holds 3, must be a list of texts"),
        ({"train": {"steps": "9" * 5000}}, "9…, must be a whole number; e.g. 300"),
        ({"data": {"train": 3}}, "data.train is 3, must be text, a list of texts or a list of mappings; e.g. embedded"),
        ({"model": 3}, "model is 3, must be a section of keys; e.g. model.hidden_size=256"),
        ({1: 2}, "unknown key '1'; allowed: data, "),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr is nan, must be at least 0.0"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr is inf, must be at least 0.0"),
        ({"name": "../up"}, "name is '../up'"),
    ],
)
def test_what_does_not_fit_gives_one_line_with_key_and_fix(values, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(TrainConfig, values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_number_too_long_to_be_printed_is_one_line(tmp_path):
    (tmp_path / "c.yaml").write_text(f"seed: 0x{'f' * 5000}\n")
    with pytest.raises(ConfigError, match="holds a whole number of 20000 bits, must be at most 1024"):
        read_config(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("values", [{"optimizer": {"schedule": "zzz"}}, {"model": {"router": "zzz"}}])
def test_allowed_words_are_listed_once(values):
    with pytest.raises(ConfigError) as caught:
        from_dict(TrainConfig, values)
    message = str(caught.value)
    assert "must be one of" in message
    assert "allowed" not in message
    assert message.count("cosine") == 1


def test_a_lone_layers_settings_have_no_section():
    with pytest.raises(ConfigError, match=r"^top_k is 9, must be between 1 and num_experts = 8"):
        MoEConfig(top_k=9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [", "is not valid YAML"),
        (b"- a\n- b\n", "holds a list, must be a mapping"),
        (b"\xff\xfe\x00", "is not UTF-8"),
        (b"model: !!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_one_error_and_runs_nothing(tmp_path, content, message):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_config(str(tmp_path / "c.yaml"))


def test_a_missing_file_says_where_ready_configs_are(tmp_path):
    with pytest.raises(ConfigError, match="remoe recipes"):
        read_config(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize("override", ["train.steps", "=3", "model.top_k.x=1"])
def test_an_override_that_cannot_be_applied_is_one_error(override):
    with pytest.raises(ConfigError, match="--set"):
        apply_overrides({"model": {"top_k": 1}}, [override])
