"""Files that try to run code, to write or read elsewhere, or to fill the memory."""

import gzip
import hashlib
import json
import lzma
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from remoe.config import from_dict, read_yaml
from remoe.data import readers, unfolding
from remoe.data.config import DataConfig
from remoe.data.corpus import open_corpus
from remoe.data.files import temporary, write_whole
from remoe.data.named_tokenizer import load_tokenizer
from remoe.data.parts import load_part
from remoe.errors import CheckpointError, ConfigError, DataError, RemoeError
from remoe.model.weights import save_model
from remoe.recipes import read_config
from remoe.training import TrainConfig, checkpoint, load, train
from remoe.training.run import Run, clear
from tests.training.conftest import MODEL, write_text


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What exists once foreign code has run."""
    return tmp_path / "foreign-code-has-run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint; tests copy it."""
    root = tmp_path_factory.mktemp("trained")
    data = {"train": str(write_text(root / "text.jsonl")), "sequence_length": 16, "cache": str(root / "cache")}
    loop = {"steps": 2, "batch_size": 4, "validation_batches": 1, "device": "cpu"}
    return train(from_dict(TrainConfig, {"name": "run", "model": MODEL, "data": data, "train": loop}), root=root).path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def export(run: Path, tmp_path: Path) -> Path:
    """Its model as an export."""
    save_model(load(run), tmp_path / "export")
    return tmp_path / "export"


def newest(run: Path) -> Path:
    return checkpoint.paths(run / "checkpoints")[-1]


def renew_manifest(path: Path, **names: str) -> None:
    """Make a checkpoint's checksums hold again, as its author could; `names` renames entries."""
    files = {
        names.get(file.name, file.name): checkpoint._entry(file)
        for file in sorted(path.iterdir())
        if file.name != checkpoint.MANIFEST
    }
    (path / checkpoint.MANIFEST).write_text(json.dumps(checkpoint._manifest(files)))


def pickles(mark: Path) -> dict[str, Callable[[Path], object]]:
    """Ways to write a pickle that runs code."""
    return {
        "pickle": lambda path: path.write_bytes(pickle.dumps(Payload(mark))),
        "torch.save": lambda path: torch.save(Payload(mark), path),
        "old torch.save": lambda path: torch.save(Payload(mark), path, _use_new_zipfile_serialization=False),
    }


@pytest.mark.parametrize("way", ["pickle", "torch.save", "old torch.save"])
def test_a_pickle_with_right_checksums_in_place_of_a_shard_is_an_error(run, mark, way):
    path = newest(run)
    pickles(mark)[way](next(path.glob("*.safetensors")))
    renew_manifest(path)
    with pytest.raises(CheckpointError, match=r"is damaged: .*header too large"):
        load(run)
    assert not mark.exists()


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pickle_in_place_of_an_exports_file_is_an_error(export, mark, way, name):
    pickles(mark)[way](export / name)
    with pytest.raises(CheckpointError, match=name):
        load(export)
    assert not mark.exists()


def test_pickles_beside_what_is_read_stay_unread(run, export, mark):
    for name in (".metadata", "__0_0.distcp", "training_state.pt", "optimizer.bin"):
        pickles(mark)["pickle"](newest(run) / name)
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        pickles(mark)["torch.save"](export / name)
    load(run)
    load(export)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.bin"])
def test_a_lone_pickle_is_no_model(tmp_path, mark, name):
    pickles(mark)["torch.save"](tmp_path / name)
    with pytest.raises(CheckpointError, match="is not a run, a checkpoint or an export"):
        load(tmp_path / name)
    assert not mark.exists()


def test_a_part_of_prepared_text_never_unpickles(tmp_path, mark):
    np.savez(tmp_path / "part.npz", words=np.array([Payload(mark)], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        load_part(tmp_path / "part.npz")
    assert not mark.exists()


def test_a_pickle_as_tokenizer_is_an_error(tmp_path, mark):
    pickles(mark)["pickle"](tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="tokenizer"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert not mark.exists()


YAML_CODE = (
    "!!python/object/apply:os.mkdir ['{mark}']",
    "!!python/object/new:os.mkdir ['{mark}']",
    "!!python/name:os.mkdir ''",
    "!!python/module:os ''",
    "!!python/object:remoe.errors.RemoeError {{}}",
)


@pytest.mark.parametrize("value", YAML_CODE)
def test_yaml_tags_run_nothing(tmp_path, run, mark, value):
    path = tmp_path / "config.yaml"
    path.write_text(f"name: {value.format(mark=mark)}\n")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read_config(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(str(run / "config.yaml"), [f"name={value.format(mark=mark)}"])
    shutil.copy(path, run / "config.yaml")
    with pytest.raises(RemoeError, match="is not valid YAML"):
        Run.open(run)
    assert not mark.exists()


def test_code_beside_an_export_is_not_run_by_us(export, mark):
    (export / "modeling_remoe.py").write_text(f"import os; os.mkdir({str(mark)!r})\n")
    (export / "__init__.py").write_text(f"import os; os.mkdir({str(mark)!r})\n")
    described = json.loads((export / "config.json").read_text())
    described["auto_map"] = {"AutoModelForCausalLM": "modeling_remoe.Hostile", "AutoConfig": "modeling_remoe.Hostile"}
    (export / "config.json").write_text(json.dumps(described))
    load(export)
    assert not mark.exists()


@pytest.mark.heavy
def test_transformers_runs_no_code_of_an_export_without_the_flag(export, mark):
    import transformers

    (export / "modeling_other.py").write_text(f"import os; os.mkdir({str(mark)!r})\n")
    described = json.loads((export / "config.json").read_text())
    described |= {"model_type": "other", "auto_map": {"AutoConfig": "modeling_other.Hostile"}}
    (export / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoConfig.from_pretrained(export, trust_remote_code=False)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../../outside.safetensors", "/etc/hostname", "sub/../../x"])
def test_a_manifest_names_nothing_outside_its_folder(run, name):
    path = newest(run)
    shard = next(path.glob("*.safetensors"))
    renew_manifest(path, **{shard.name: name})
    with pytest.raises(CheckpointError, match=f"names '{name}', must be a file in it"):
        checkpoint.read(path)


def test_a_shard_that_the_manifest_does_not_list_is_refused(run):
    path = newest(run)
    shard = next(path.glob("*.safetensors"))
    shutil.copy(shard, path / "shard-00009-model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"shard-00009.* is not in its manifest.json; remove the file"):
        checkpoint.read(path)


def test_an_index_names_nothing_outside_the_export(run, tmp_path):
    folder = tmp_path / "sharded"
    save_model(load(run), folder, max_shard_bytes=4000)
    outside = shutil.move(min(folder.glob("*-of-*.safetensors")), tmp_path / "model-outside.safetensors")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    hostile = dict.fromkeys(weight_map, f"../{Path(outside).name}")
    index.write_text(json.dumps({"weight_map": weight_map | hostile}))
    with pytest.raises(CheckpointError, match=r"sharded/model-outside\.safetensors does not exist"):
        load(folder)


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "a/./b", "..", "a\\..\\b", "a\0b", "~/x"])
def test_a_run_has_no_name_that_leads_elsewhere(name):
    with pytest.raises(ConfigError, match="name is"):
        TrainConfig(name=name)


def test_overwriting_a_run_removes_links_and_not_what_they_point_to(run, tmp_path):
    for entry in ("checkpoints", "tokenizer"):
        shutil.move(run / entry, tmp_path / entry)
        (run / entry).symlink_to(tmp_path / entry)
    (run / "report.html").symlink_to(tmp_path / "precious.txt")
    (tmp_path / "precious.txt").write_text("precious")
    clear(run)
    assert list(run.iterdir()) == []
    assert newest(tmp_path).is_dir()
    assert (tmp_path / "precious.txt").read_text() == "precious"


def test_pruning_removes_a_linked_checkpoint_and_not_what_it_points_to(run, tmp_path):
    folder, kept = run / "checkpoints", Path(shutil.move(newest(run), tmp_path / "kept"))
    for name in ("step_00000001", "step_00000009.tmp"):
        (folder / name).symlink_to(kept)
    checkpoint.write(folder, {"x": torch.ones(1)}, {"step": 3})
    checkpoint.prune(folder, keep=1, best_step=None)
    assert [path.name for path in folder.iterdir()] == ["step_00000003"]
    assert checkpoint.read(kept).step == 2


def test_a_planted_link_in_place_of_a_scratch_file_is_not_written_through(run, export, tmp_path):
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    scratch = (run / "config.yaml.tmp", run / "metrics.tmp", export / "config.json.partial")
    scratch += (export / "model.safetensors.partial", temporary(tmp_path / "words.json"))
    for path in scratch:
        path.symlink_to(precious)
    train(Run.open(run).config, resume=True, root=tmp_path)
    save_model(load(run), export)
    write_whole(tmp_path / "words.json", b"{}")
    assert precious.read_text() == "precious"
    assert not any(path.is_symlink() for path in scratch)


def test_a_configs_aliases_do_not_unfold_without_end(tmp_path):
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    for text_of_config in ("\n".join(rows), "model: &m\n  router: *m\n"):
        (tmp_path / "c.yaml").write_text(text_of_config)
        with pytest.raises(ConfigError, match="unfolds to more than 100000 values"):
            read_yaml(tmp_path / "c.yaml")


@pytest.mark.parametrize("content", ["[" * 1200, "{a: " * 1200, "- " * 1200])
def test_a_config_nested_too_deep_is_one_error(tmp_path, content):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read_config(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("name", ["manifest.json", "training.json"])
def test_json_nested_too_deep_is_one_error(run, name):
    path = newest(run)
    (path / name).write_text('{"a":' * 100_000)
    if name == "training.json":
        renew_manifest(path)
    with pytest.raises(CheckpointError, match=f"{name} is not JSON"):
        checkpoint.read(path)


def bombs() -> dict[str, Callable[[int, bytes], bytes]]:
    """Compressed files of so many bytes of one kind."""

    def zst(size: int, byte: bytes) -> bytes:
        zstandard = pytest.importorskip("zstandard")
        return zstandard.ZstdCompressor().compress(byte * size)

    return {
        ".gz": lambda size, byte: gzip.compress(byte * size),
        ".xz": lambda size, byte: lzma.compress(byte * size),
        ".zst": zst,
    }


def bytes_of_chunks(path: Path) -> Iterator[int]:
    return (sum(map(len, chunk.records)) for chunk in readers.iter_chunks(path, chunk_bytes=1 << 20))


@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_a_zip_bomb_is_stopped_early(tmp_path, monkeypatch, kind, ending):
    monkeypatch.setattr(unfolding, "FREE_BYTES", 1 << 20)
    path = tmp_path / f"bomb{kind}{ending}"
    path.write_bytes(bombs()[ending](16 << 20, b"a"))
    read: list[int] = []
    with pytest.raises(DataError, match=r"unfolds to more than 200 times its size.*zip bomb"):
        read.extend(bytes_of_chunks(path))
    assert sum(read) < 8 << 20, "it must stop before all is out"


def test_a_parquet_bomb_is_stopped_early(tmp_path, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(unfolding, "FREE_BYTES", 1 << 20)
    path = tmp_path / "bomb.parquet"
    row = "a" * 4096
    parquet.write_table(pyarrow.table({"text": [row] * 5000}), path, compression="zstd")
    read: list[int] = []
    with pytest.raises(DataError, match="unfolds to more than"):
        read.extend(bytes_of_chunks(path))
    assert sum(read) < 10 << 20, "it must stop before all is out"


def test_text_that_compresses_well_is_no_bomb(tmp_path):
    line = json.dumps({"text": "the same words again and again " * 20}) + "\n"
    path = tmp_path / "text.jsonl.xz"
    path.write_bytes(lzma.compress(line.encode() * 5000))
    assert sum(len(chunk.records) for chunk in readers.iter_chunks(path)) == 5000


def test_a_bomb_as_corpus_leaves_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(unfolding, "FREE_BYTES", 1 << 20)
    path = tmp_path / "bomb.txt.gz"
    path.write_bytes(gzip.compress(b"a" * (16 << 20)))
    with pytest.raises(DataError, match="zip bomb"):
        open_corpus(DataConfig(train=str(path), cache=tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_checksums_of_the_tests_are_those_of_the_manifest(run):
    before = (newest(run) / checkpoint.MANIFEST).read_text()
    renew_manifest(newest(run))
    assert json.loads(before) == json.loads((newest(run) / checkpoint.MANIFEST).read_text())
    assert hashlib.sha256(b"").hexdigest() == checkpoint._digest(b"")
