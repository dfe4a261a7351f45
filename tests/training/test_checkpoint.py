"""Facts about checkpoints on disk."""

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from remoe.errors import CheckpointError, TrainingError
from remoe.training import checkpoint

TENSORS = {
    "matrix": torch.arange(6.0).view(2, 3),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "scalar": torch.tensor(7),
    "double": torch.tensor([0.1], dtype=torch.float64),
    "flag": torch.tensor(True),
    "half": torch.tensor([1.5], dtype=torch.bfloat16),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "empty": torch.zeros(0, 3),
}


def write(folder: Path, step: int) -> Path:
    return checkpoint.write(folder, TENSORS, {"step": step}).path


def data_file(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_tensors_of_every_kind_come_back_bit_for_bit(tmp_path):
    found = checkpoint.read(write(tmp_path, 3))
    restored = {name: torch.full_like(value, 1) for name, value in TENSORS.items()}
    found.load(restored)
    assert found.step == 3
    assert all(torch.equal(restored[name], value) for name, value in TENSORS.items())


def test_some_of_the_tensors_can_be_read_alone(tmp_path):
    restored = {"double": torch.zeros(1, dtype=torch.float64)}
    checkpoint.read(write(tmp_path, 1)).load(restored)
    assert restored["double"].tolist() == [0.1]


def test_tensors_are_split_over_files_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_FILE_BYTES", 30)
    path = write(tmp_path, 1)
    restored: dict[str, Tensor] = {name: torch.zeros_like(value) for name, value in TENSORS.items()}
    checkpoint.read(path).load(restored)
    assert len(list(path.glob("*.safetensors"))) > 2
    assert all(torch.equal(restored[name], value) for name, value in TENSORS.items())


def test_writing_and_reading_never_pickle(tmp_path, monkeypatch):
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("dump", "dumps", "load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    path = write(tmp_path, 1)
    checkpoint.read(path).load({"matrix": torch.zeros(2, 3)})
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize(("name", "tensor"), [("matrix", torch.zeros(3, 3)), ("other", torch.zeros(1))])
def test_tensors_that_do_not_fit_are_named(tmp_path, name, tensor):
    with pytest.raises(CheckpointError, match=f"does not fit this model.*{name}"):
        checkpoint.read(write(tmp_path, 1)).load({name: tensor})


@pytest.mark.parametrize("where", [0, 100, -1])
def test_a_flipped_bit_in_the_tensors_is_found(tmp_path, where):
    path = write(tmp_path, 1)
    flip_bit(data_file(path), where)
    with pytest.raises(CheckpointError, match=r"damaged.*does not match its checksum"):
        checkpoint.read(path)


def test_a_flipped_bit_anywhere_in_a_json_file_is_found(tmp_path):
    path = write(tmp_path, 1)
    for name in (checkpoint.MANIFEST, checkpoint.RECORD):
        content = (path / name).read_bytes()
        for position in range(len(content)):
            flip_bit(path / name, position)
            with pytest.raises(CheckpointError, match="damaged"):
                checkpoint.read(path)
            (path / name).write_bytes(content)


def test_a_truncated_or_missing_file_is_found(tmp_path):
    path = write(tmp_path, 1)
    os.truncate(data_file(path), 50)
    with pytest.raises(CheckpointError, match="has 50 bytes"):
        checkpoint.read(path)
    data_file(path).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoint.read(path)


def test_the_newest_whole_checkpoint_wins_and_damaged_ones_are_told(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    flip_bit(data_file(tmp_path / "step_00000003"), -1)
    (tmp_path / "step_00000002" / checkpoint.MANIFEST).unlink()
    found, damaged = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert [str(error).split("/")[-1] for error in damaged] == [
        f"step_00000003 is damaged: {data_file(tmp_path / 'step_00000003').name} does not match its checksum",
        "step_00000002 is not complete: manifest.json is missing",
    ]


def test_no_checkpoint_is_none_but_only_damaged_ones_are_an_error(tmp_path):
    assert checkpoint.newest(tmp_path / "absent") == (None, [])
    flip_bit(data_file(write(tmp_path, 1)), -1)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used"):
        checkpoint.newest(tmp_path)


def test_a_full_disk_keeps_the_last_checkpoint_and_says_what_to_do(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"No space left on device; the last complete one is .*step_00000001"):
        write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert checkpoint.read(tmp_path / "step_00000001").step == 1


def test_what_a_killed_writer_left_is_no_checkpoint_and_is_cleaned_up(tmp_path):
    write(tmp_path, 1)
    partial = tmp_path / "step_00000002.tmp"
    partial.mkdir()
    (partial / "half").write_text("x")
    found, damaged = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.step, damaged) == (1, [])
    write(tmp_path, 3)
    assert not partial.exists()


def test_the_last_few_and_the_best_are_kept(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, keep=2, best_step=2)
    assert [checkpoint.step_of(path) for path in checkpoint.paths(tmp_path)] == [2, 4, 5]


def test_a_checkpoint_that_is_pruned_while_it_is_read_gives_way_to_the_next(tmp_path, monkeypatch):
    write(tmp_path, 1)
    original = checkpoint._read_json

    def prune_first(path):
        monkeypatch.undo()
        write(tmp_path, 2)
        checkpoint.prune(tmp_path, keep=1, best_step=None)
        return original(path)

    monkeypatch.setattr(checkpoint, "_read_json", prune_first)
    found, damaged = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.step, damaged) == (2, [])


def test_a_checkpoint_that_is_gone_before_its_tensors_are_read_says_so(tmp_path):
    found = checkpoint.read(write(tmp_path, 1))
    write(tmp_path, 2)
    checkpoint.prune(tmp_path, keep=1, best_step=None)
    with pytest.raises(CheckpointError, match=r"step_00000001 was removed while it was read.*try again"):
        found.load({"matrix": torch.zeros(2, 3)})


def rewrite_schema(path: Path, schema: int) -> None:
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["schema"] = schema
    del manifest["sha256"]
    manifest["sha256"] = checkpoint._digest(json.dumps(manifest).encode())
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def test_an_older_schema_is_upgraded_when_read(tmp_path, monkeypatch):
    path = write(tmp_path, 4)
    rewrite_schema(path, checkpoint.SCHEMA - 1)
    monkeypatch.setitem(checkpoint.UPGRADES, checkpoint.SCHEMA - 1, lambda record: record | {"upgraded": True})
    assert checkpoint.read(path).record == {"step": 4, "upgraded": True}


def test_a_newer_schema_is_refused_rather_than_passed_over(tmp_path):
    write(tmp_path, 1)
    rewrite_schema(write(tmp_path, 2), checkpoint.SCHEMA + 1)
    with pytest.raises(CheckpointError, match="update remoe"):
        checkpoint.newest(tmp_path)
