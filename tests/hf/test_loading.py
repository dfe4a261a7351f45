"""The same checkpoint in both worlds: what one saves the other loads, to the last bit."""

import json

import pytest
import torch
import transformers

import remoe
from remoe import hf
from remoe.model.weights import save_model

pytestmark = pytest.mark.heavy

SETTINGS = {
    "relu": {},
    "topk, tied": {"router": "topk", "tie_embeddings": True},
    "recurrent_relu": {"router": {"name": "recurrent_relu", "state_size": 16}},
    "rmoe, dialled": {"router": {"name": "rmoe", "gate": "relu"}, "thresholds": [0.1, 0.2]},
}
each = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


def assert_same_model(model, other, tokens_BS):
    state = other.state_dict()
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert model(tokens_BS).logits.equal(other(tokens_BS).logits)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_what_remoe_saved(build, tokens_BS, tmp_path, settings, dtype):
    model = build(**settings).to(dtype)
    save_model(model, tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(other) is hf.ReMoEForCausalLM
    assert other.dtype == dtype
    assert_same_model(model, other, tokens_BS)


@each
@pytest.mark.parametrize("how", [{"device_map": "auto"}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}], ids=str)
def test_every_way_of_loading_on_one_device_gives_the_same_model(build, tokens_BS, tmp_path, settings, how):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = build(**settings)
    save_model(model, tmp_path)
    assert_same_model(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **how), tokens_BS)


@each
def test_layers_that_are_left_on_disk_compute_and_generate_the_same(build, tokens_BS, tmp_path, settings):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = build(**settings)
    save_model(model, tmp_path)
    parts = [name for name, _ in hf.from_native(model).model.named_children() if name != "layers"]
    places = {f"model.{name}": "cpu" for name in parts} | {"lm_head": "cpu", "model.layers.0": "cpu"}
    places |= {f"model.layers.{index}": "disk" for index in (1, 2)}
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert {parameter.device.type for parameter in other.model.layers[2].parameters()} == {"meta"}
    with torch.no_grad():
        assert other(tokens_BS).logits.equal(model(tokens_BS).logits)
    assert other.generate(tokens_BS, max_new_tokens=4, do_sample=False).equal(model.generate(tokens_BS, 4))


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "auto"])
def test_weights_are_loaded_in_the_type_that_is_asked_for(build, tokens_BS, tmp_path, settings, dtype):
    model = build(**settings)
    save_model(model, tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {value.dtype for value in other.parameters()} == {torch.float32 if dtype == "auto" else torch.bfloat16}
    assert_same_model(model if dtype == "auto" else model.to(torch.bfloat16), other, tokens_BS)


@each
def test_remoe_loads_what_transformers_saved_in_shards(build, tokens_BS, tmp_path, settings):
    other = hf.from_native(build(**settings))
    other.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = remoe.load(tmp_path)
    assert_same_model(model, other, tokens_BS)
    assert model.config.router == other.config.router


def test_saving_writes_the_file_that_auto_map_names(build, tmp_path):
    hf.from_native(build()).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "modeling_remoe.ReMoEConfig",
        "AutoModel": "modeling_remoe.ReMoEModel",
        "AutoModelForCausalLM": "modeling_remoe.ReMoEForCausalLM",
    }
    assert (tmp_path / "modeling_remoe.py").is_file()


def test_the_base_model_loads_alone(build, tokens_BS, tmp_path):
    model = hf.from_native(build())
    model.save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    hidden_BSH = base(tokens_BS).last_hidden_state
    assert model.lm_head(hidden_BSH).equal(model(tokens_BS).logits)


def test_the_experts_k_is_no_setting_of_sampling(build, tmp_path):
    model = hf.from_native(build(top_k=2))
    assert model.generation_config.top_k is None
    save_model(build(top_k=2), tmp_path)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.top_k is None
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.generation_config.top_k, loaded.config.top_k) == (None, 2)


def test_native_and_transformers_share_tensors_both_ways(build):
    model = build(tie_embeddings=True, head_size=8)
    other = hf.from_native(model)
    again = hf.to_native(other)
    assert again.config == model.config
    assert other.lm_head.weight is other.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == dict(again.named_parameters())[name].data_ptr()


def test_transformers_names_of_settings_work(tmp_path):
    config = hf.ReMoEConfig(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, rms_norm_eps=1e-6)
    config.save_pretrained(tmp_path)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (loaded.num_layers, loaded.num_heads, loaded.num_kv_heads, loaded.norm_eps) == (3, 8, 2, 1e-6)
    assert loaded.head_dim == loaded.head_size == 32
