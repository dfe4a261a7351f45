"""Facts about model files."""

import errno
import json
import os
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from remoe.errors import CheckpointError
from remoe.model.weights import load_model, save_model


@pytest.fixture
def saved(build, tmp_path):
    save_model(build(), tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "settings", [{}, {"tie_embeddings": True}, {"moe_layers": "none"}, {"router": {"name": "topk"}}]
)
def test_a_loaded_model_equals_the_saved_one(build, tokens_BS, tmp_path, settings):
    model = build(**settings)
    save_model(model, tmp_path / "new" / "folder")
    loaded = load_model(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    assert not loaded.training
    assert torch.equal(loaded(tokens_BS).logits, model(tokens_BS).logits)
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.parameters())
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_keeps_its_dtype(build, tmp_path):
    save_model(build().bfloat16(), tmp_path)
    assert {parameter.dtype for parameter in load_model(tmp_path).parameters()} == {torch.bfloat16}


def test_large_models_become_shards_with_an_index(build, tokens_BS, tmp_path):
    model = build()
    save_model(model, tmp_path, max_shard_bytes=40_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = index_of(tmp_path)
    assert set(index["weight_map"]) == set(model.state_dict())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert torch.equal(load_model(tmp_path)(tokens_BS).logits, model(tokens_BS).logits)


def test_a_later_save_with_fewer_or_more_files_is_what_loads(build, tokens_BS, tmp_path):
    for seed, max_shard_bytes in ((1, 40_000), (2, 5e9), (3, 60_000)):
        model = build(seed=seed)
        save_model(model, tmp_path, max_shard_bytes=max_shard_bytes)
        assert torch.equal(load_model(tmp_path)(tokens_BS).logits, model(tokens_BS).logits)
    assert not (tmp_path / "model.safetensors").exists()
    assert len(list(tmp_path.glob("model-*"))) == len(set(index_of(tmp_path)["weight_map"].values()))


def index_of(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())


def test_a_full_disk_leaves_the_old_model(build, saved, tokens_BS, monkeypatch):
    before = load_model(saved)(tokens_BS).logits

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("remoe.model.weights.save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_model(build(seed=9), saved)
    assert torch.equal(load_model(saved)(tokens_BS).logits, before)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_a_loaded_model_does_not_depend_on_its_file(saved, tokens_BS):
    model = load_model(saved)
    before = model(tokens_BS).logits
    (saved / "model.safetensors").write_bytes(b"")
    assert torch.equal(model(tokens_BS).logits, before)


def test_the_file_is_an_ordinary_safetensors_file(saved, build):
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(build().state_dict())
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95, 1.0])
def test_a_flipped_bit_anywhere_is_found(saved, share):
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    content[min(header + int(share * (len(content) - header)), len(content) - 1)] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum differs"):
        load_model(saved)


@pytest.mark.parametrize("place", [0, 3, 8, 20, 60, 150])
def test_a_flipped_bit_in_the_header_is_found(saved, place):
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_model(saved)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_found(saved, share):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_model(saved)


def test_a_missing_tensor_is_named(saved):
    edit_tensors(saved, lambda tensors: tensors.pop("model.layers.2.mlp.router.weight"))
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.2\.mlp\.router\.weight'"):
        load_model(saved)


def test_a_tensor_that_nothing_reads_is_named(saved):
    edit_tensors(saved, lambda tensors: tensors.update({"model.layers.9.norm": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.9\.norm' that the model .* does not have"):
        load_model(saved)


def test_another_shape_is_named_with_both_shapes(saved):
    edit_config(saved, intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"down_proj' has shape \[4, 32, 48\], must be \[4, 32, 64\]"):
        load_model(saved)


def test_another_vocabulary_is_named(saved):
    edit_config(saved, vocab_size=70)
    with pytest.raises(CheckpointError, match="the vocabulary has 61 tokens there, 70 in"):
        load_model(saved)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"config\.json does not exist"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), r"config\.json is damaged"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "has no key 'vocab_size'"),
        (lambda folder: edit_config(folder, schema_version=99), "schema_version 99, must be at most 1"),
        (lambda folder: edit_config(folder, num_heads=5), r"model\.num_heads is 5, must divide"),
        (lambda folder: edit_config(folder, router="rely"), "did you mean 'relu'"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors does not exist"),
    ],
)
def test_a_folder_that_is_not_complete_says_what_is_wrong(saved, damage, message):
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        load_model(saved)


def test_a_missing_shard_is_named(build, tmp_path):
    save_model(build(), tmp_path, max_shard_bytes=40_000)
    next(iter(sorted(tmp_path.glob("model-00002*")))).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-\d+\.safetensors does not exist"):
        load_model(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(build, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the model to"):
        save_model(build(), tmp_path / "file")


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_files_get_the_mode_that_the_umask_gives(build, tmp_path):
    before = os.umask(0o027)
    try:
        save_model(build(), tmp_path)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "config.json": 0o640,
        "model.safetensors": 0o640,
    }


def test_a_full_disk_leaves_no_empty_folder(build, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("remoe.model.weights.save_file", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_model(build(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_model(build(), tmp_path)
    assert tmp_path.exists()
