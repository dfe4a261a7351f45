"""Facts about loading trained models."""

import pytest
import torch

from remoe.errors import CheckpointError
from remoe.model.weights import save_model
from remoe.training import Run, checkpoint, load, train
from remoe.training.loading import fill, find_checkpoint, outline


def test_run_checkpoint_and_export_load_the_same_model_in_eval_mode(config, tmp_path):
    run = train(config(model={"tie_embeddings": True}), root=tmp_path)
    from_run = load(run.path)
    export = tmp_path / "export"
    save_model(from_run, export)
    tokens_BS = torch.arange(12).view(2, 6)
    expected = from_run(tokens_BS).logits
    for path in (run.checkpoints / "step_00000006", export):
        model = load(path)
        assert not model.training
        assert torch.equal(model(tokens_BS).logits, expected)


def test_an_export_reads_a_checkpoint_file_by_file(config, tmp_path):
    router = {"name": "recurrent_relu", "state_size": 8}
    run = train(config(train={"steps": 2}, model={"router": router}), root=tmp_path)
    found = find_checkpoint(run.path)
    sizes = []

    def read(tensors):
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        fill(found, tensors)

    save_model(load(run.path), tmp_path / "whole", max_shard_bytes=20_000)
    save_model(outline(found), tmp_path / "by_file", max_shard_bytes=20_000, fill=read)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "by_file").iterdir()) == files
    whole, by_file = load(tmp_path / "whole").state_dict(), load(tmp_path / "by_file").state_dict()
    assert all(torch.equal(by_file[name], value) for name, value in whole.items())
    assert len(sizes) > 2
    assert max(sizes) <= 20_000


def test_a_folder_that_is_none_of_these_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="is not a run, a checkpoint or an export"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=r"is not a run: it has no config.yaml"):
        Run.open(tmp_path)


def test_a_run_without_a_checkpoint_says_so(config, tmp_path):
    run = train(config(train={"steps": 2}), root=tmp_path)
    for path in checkpoint.paths(run.checkpoints):
        path.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load(run.path)
    assert load(tmp_path / "moved") is not None


def test_a_damaged_checkpoint_given_by_name_is_refused(config, tmp_path):
    run = train(config(train={"steps": 2}), root=tmp_path)
    path = run.checkpoints / "step_00000002"
    next(path.glob("*.safetensors")).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="has 5 bytes"):
        load(path)
