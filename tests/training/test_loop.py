"""Facts about whole runs."""

import errno
import itertools
import json
import os
import shutil
import signal
import threading

import pytest
import torch

from remoe.config import from_dict, to_dict
from remoe.errors import CheckpointError, ConfigError, DataError, TrainingError
from remoe.training import Run, TrainConfig, checkpoint, load, train, trainer
from remoe.training.micro_batch import MicroBatchLoss
from remoe.training.signals import RunStoppedError
from remoe.training.step import Stepper


class Listener:
    """A reporter that remembers what it heard."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int, int]] = []
        self.steps: list[int] = []
        self.messages: list[str] = []
        self.finished: list[Run] = []

    def start(self, name: str, total: int, done: int) -> None:
        self.started.append((name, total, done))

    def step(self, metrics: dict) -> None:
        self.steps.append(metrics["step"])

    def message(self, text: str) -> None:
        self.messages.append(text)

    def finish(self, run: Run) -> None:
        self.finished.append(run)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    """A run of six steps, and its folder's parent."""
    root = tmp_path_factory.mktemp("finished")
    values = {
        "name": "small",
        "model": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 16,
                  "num_experts": 4, "init_std": 0.1},
        "data": {"train": str(text), "sequence_length": 16, "cache": str(text.parent / "cache")},
        "optimizer": {"warmup_steps": 2, "lr": 0.01},
        "train": {"steps": 6, "batch_size": 4, "validation_interval": 4, "validation_batches": 2,
                  "checkpoint_interval": 2, "flip_interval": 3, "device": "cpu"},
    }  # fmt: skip
    return train(from_dict(TrainConfig, values), root=root)


def test_a_run_leaves_config_metrics_tokenizer_and_checkpoints(finished):
    assert {path.name for path in finished.path.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "tokenizer",
        "checkpoints",
    }
    assert [path.name for path in checkpoint.paths(finished.checkpoints)] == ["step_00000004", "step_00000006"]
    reopened = Run.open(finished.path)
    assert reopened.config == finished.config
    assert reopened.config.model.vocab_size == 257


def test_each_line_has_the_promised_keys(finished):
    lines = finished.metrics()
    keys = {"step", "tokens", "lm_loss", "loss", "lr", "grad_norm", "sparsity", "sparsity_coef", "sparsity_l1"}
    keys |= {"load_balancing", "tokens_per_second", "step_seconds", "skipped", "active_experts", "layers"}
    keys |= {"load_balancing_coef"}
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(keys <= line.keys() for line in lines)
    assert [line["step"] for line in lines if "valid_loss" in line] == [4, 6]
    assert [line["step"] for line in lines if "valid_active_experts" in line] == [4, 6]
    assert all(line["load_balancing"] > 1 and line["load_balancing_coef"] == 0 for line in lines)
    assert [line["step"] for line in lines if "flip_rate" in line] == [3, 6]
    assert all(len(line["layers"]["max_load"]) == 2 for line in lines)
    assert lines[-1]["tokens"] == finished.tokens == 6 * 4 * 16


def test_the_first_line_has_the_initial_coefficient_and_each_next_one_moved_by_the_rule(finished):
    lines = finished.metrics()
    assert lines[0]["sparsity_coef"] == pytest.approx(1e-8)
    for line, following in itertools.pairwise(lines):
        factor = 1.2 if line["sparsity"] < 0.75 else 1 / 1.2
        assert following["sparsity_coef"] == pytest.approx(line["sparsity_coef"] * factor)


def test_loss_falls_and_validation_is_per_domain(finished):
    lines = finished.metrics()
    assert lines[-1]["lm_loss"] < lines[0]["lm_loss"] - 0.1
    last = lines[-1]
    assert finished.valid_loss == last["valid_loss"]
    assert set(last["valid_loss_per_domain"]) == {"animals", "numbers"}


def test_the_same_config_gives_the_same_run_and_leaves_global_state_alone(finished, tmp_path, numbers):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    again = train(finished.config, root=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert numbers(again.metrics()) == numbers(finished.metrics())


def test_an_existing_run_needs_resume_or_overwrite_and_is_left_alone(finished):
    before = (finished.path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"exists; --resume goes on with it, --overwrite begins it anew"):
        train(finished.config, root=finished.path.parent)
    with pytest.raises(ConfigError, match="exclude each other"):
        train(finished.config, root=finished.path.parent, resume=True, overwrite=True)
    assert (finished.path / "metrics.jsonl").read_bytes() == before


def test_overwrite_begins_anew_and_keeps_what_is_not_the_runs(config, tmp_path):
    first = train(config(train={"steps": 3}), root=tmp_path)
    (first.path / "notes.txt").write_text("mine")
    second = train(config(train={"steps": 2}), root=tmp_path, overwrite=True)
    assert [line["step"] for line in second.metrics()] == [1, 2]
    assert [path.name for path in checkpoint.paths(second.checkpoints)] == ["step_00000002"]
    assert (first.path / "notes.txt").read_text() == "mine"


def test_a_mistake_is_found_before_anything_is_written(config, tmp_path):
    good = train(config(train={"steps": 2}), root=tmp_path)
    before = sorted(str(path) for path in good.path.rglob("*"))
    with pytest.raises(DataError):
        train(config(data={"train": str(tmp_path / "missing.txt")}), root=tmp_path, overwrite=True)
    with pytest.raises(ConfigError, match=r"model.vocab_size is 5, must be at least 257"):
        train(config(model={"vocab_size": 5}), root=tmp_path, overwrite=True)
    with pytest.raises(ConfigError, match=r"train.device is 'tpu', must be auto, cpu, cuda"):
        train(config("other", train={"device": "tpu"}), root=tmp_path)
    assert sorted(str(path) for path in good.path.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("router", ["relu", "topk"])
@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_stopped_and_resumed_run_is_bit_for_bit_the_whole_one(config, tmp_path, numbers, router, stop_at):
    whole = train(config("whole", model={"router": router}), root=tmp_path)
    train_until(config("parts", model={"router": router}), tmp_path, stop_at)
    parts = train(config("parts", model={"router": router}), root=tmp_path, resume=True)
    assert numbers(parts.metrics()) == numbers(whole.metrics())
    for name, tensor in load(whole.path).state_dict().items():
        assert torch.equal(tensor, load(parts.path).state_dict()[name]), name


@pytest.mark.parametrize(
    "sparsity", [{"per_layer": True}, {"loads": "previous_step"}, {"mode": "released"}], ids=lambda value: str(value)
)
def test_every_kind_of_sparsity_state_is_resumed(config, tmp_path, numbers, sparsity):
    whole = train(config("whole", sparsity=sparsity), root=tmp_path)
    train_until(config("parts", sparsity=sparsity), tmp_path, 2)
    parts = train(config("parts", sparsity=sparsity), root=tmp_path, resume=True)
    assert numbers(parts.metrics()) == numbers(whole.metrics())


def train_until(config: TrainConfig, root, step: int) -> None:
    """Leave a run as a kill after `step` would: later lines logged, a later checkpoint half written."""
    run = train(config, root=root)
    for path in checkpoint.paths(run.checkpoints):
        shutil.rmtree(path)
    shorter = from_dict(TrainConfig, to_dict(config) | {"name": f"{config.name}-short"})
    with StopAfter(step), pytest.raises(RunStoppedError):
        train(shorter, root=root)
    short = root / shorter.name / "checkpoints" / f"step_{step:08d}"
    record = json.loads((short / checkpoint.RECORD).read_text())
    assert record["step"] == step
    short.rename(run.checkpoints / short.name)
    shutil.rmtree(root / shorter.name)
    (run.checkpoints / "step_00000099.tmp").mkdir()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')


class StopAfter:
    """Sends this process one SIGTERM during a given step."""

    def __init__(self, step: int) -> None:
        self.step: int | None = step

    def __enter__(self) -> None:
        self.original = Stepper.run

        def run_and_signal(stepper: Stepper, batch, step: int):
            if step == self.step:
                self.step = None
                os.kill(os.getpid(), signal.SIGTERM)
            return self.original(stepper, batch, step)

        Stepper.run = run_and_signal

    def __exit__(self, *error: object) -> None:
        Stepper.run = self.original


def test_a_signal_finishes_the_step_writes_a_checkpoint_and_says_how_to_go_on(config, tmp_path):
    listener = Listener()
    with StopAfter(3), pytest.raises(RunStoppedError, match=r"stopped by SIGTERM after step 3; --resume") as caught:
        train(config(), root=tmp_path, reporter=listener)
    assert caught.value.exit_code == 143
    assert listener.steps == [1, 2, 3]
    assert len(listener.finished) == 1
    assert [path.name for path in checkpoint.paths(tmp_path / "small" / "checkpoints")] == [
        "step_00000002",
        "step_00000003",
    ]


def test_resume_without_a_checkpoint_starts_at_0(config, tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "metrics.jsonl").write_text('{"step": 1}\n')
    listener = Listener()
    run = train(config(train={"steps": 2}), root=tmp_path, resume=True, reporter=listener)
    assert listener.started == [("small", 2, 0)]
    assert [line["step"] for line in run.metrics()] == [1, 2]
    assert all("lm_loss" in line for line in run.metrics())


def test_resuming_a_finished_run_changes_nothing_and_more_steps_go_on(config, tmp_path):
    run = train(config(optimizer={"schedule": "constant"}), root=tmp_path)
    before = (run.path / "metrics.jsonl").read_bytes()
    assert train(config(optimizer={"schedule": "constant"}), root=tmp_path, resume=True).valid_loss == run.valid_loss
    assert (run.path / "metrics.jsonl").read_bytes() == before
    more = config(optimizer={"schedule": "constant"}, train={"steps": 8, "micro_batch_size": 2})
    longer = train(more, root=tmp_path, resume=True)
    assert [line["step"] for line in longer.metrics()] == list(range(1, 9))
    assert Run.open(run.path).config.train.steps == 8


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"hidden_size": 32}}, r"model.hidden_size is 32, but .* was trained with 16"),
        ({"model": {"router": "topk"}}, r"model.router is 'topk', but .* was trained with 'relu'"),
        ({"optimizer": {"lr": 0.02}}, r"optimizer.lr is 0.02, but .* was trained with 0.01"),
        ({"data": {"sequence_length": 8}}, r"data.sequence_length is 8, but .* was trained with 16"),
        ({"train": {"batch_size": 8}}, r"train.batch_size is 8, but .* was trained with 4"),
        ({"train": {"steps": 4}}, r"train.steps is 4, must be at least 6"),
    ],
)
def test_resume_with_another_model_data_or_optimizer_names_key_and_values(config, finished, sections, message):
    before = sorted(path.stat().st_mtime_ns for path in finished.path.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        train(config(**sections), root=finished.path.parent, resume=True)
    assert sorted(path.stat().st_mtime_ns for path in finished.path.rglob("*")) == before


def test_resume_with_other_text_under_the_same_path_is_refused(config, tmp_path, text):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(text.read_bytes())
    changed = config(data={"train": str(copy)}, train={"steps": 2})
    train(changed, root=tmp_path)
    copy.write_bytes(text.read_bytes() + text.read_bytes()[:600].splitlines(keepends=True)[0])
    with pytest.raises(ConfigError, match=r"data.train is now documents .* was trained with documents"):
        train(changed, root=tmp_path, resume=True)


def test_a_flipped_bit_falls_back_to_the_checkpoint_before_and_says_so(config, tmp_path, numbers):
    run = train(config(), root=tmp_path)
    lines = numbers(run.metrics())
    damaged = next((run.checkpoints / "step_00000006").glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    with pytest.warns(UserWarning, match=r"step_00000006 is damaged.*using step_00000004"):
        load(run.path)
    listener = Listener()
    resumed = train(config(), root=tmp_path, resume=True, reporter=listener)
    assert len(listener.messages) == 1
    assert "step_00000006 is damaged" in listener.messages[0]
    assert "going on from step_00000004" in listener.messages[0]
    assert listener.started == [("small", 6, 4)]
    assert numbers(resumed.metrics()) == lines
    assert (run.checkpoints / "step_00000006.damaged").is_dir()
    assert load(run.path) is not None


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again_silently(config, tmp_path):
    run = train(config(train={"steps": 2}), root=tmp_path)
    (run.checkpoints / "step_00000002" / checkpoint.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"can be used.*; --overwrite begins the run anew$"):
        train(config(train={"steps": 2}), root=tmp_path, resume=True)


def test_a_full_disk_stops_the_run_with_the_last_checkpoint_whole(config, tmp_path, monkeypatch):
    original = checkpoint._write_tensors

    def fill_up(folder, *rest):
        original(folder, *rest)
        if folder.name == "step_00000004.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_write_tensors", fill_up)
    with pytest.raises(TrainingError, match=r"No space left on device; the last complete one is .*step_00000002"):
        train(config(), root=tmp_path)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "small" / "checkpoints").iterdir()] == ["step_00000002"]
    assert train(config(), root=tmp_path, resume=True).step == 6


def test_too_many_bad_steps_in_a_row_abort_with_advice(config, tmp_path, monkeypatch):
    original = MicroBatchLoss.__call__

    def poisoned(loss, *arguments):
        measured = original(loss, *arguments)
        return measured._replace(values=measured.values | {"loss": measured.values["loss"] * float("nan")})

    monkeypatch.setattr(MicroBatchLoss, "__call__", poisoned)
    with pytest.raises(
        TrainingError, match=r"step 3 is number 3 in a row .*train.max_bad_steps = 3.*lower optimizer.lr"
    ):
        train(config(train={"max_bad_steps": 3, "checkpoint_interval": 100}), root=tmp_path)
    lines = Run.open(tmp_path / "small").metrics()
    assert [(line["loss"], line["skipped"]) for line in lines] == [(None, 1), (None, 2), (None, 3)]
    assert [line["sparsity_coef"] for line in lines] == [pytest.approx(1e-8)] * 3


def test_the_best_checkpoint_is_kept_besides_the_last(config, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.6])
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: fake_result(next(losses)))
    intervals = {"validation_interval": 3, "checkpoint_interval": 4, "keep_checkpoints": 1}
    run = train(config(train={"steps": 12} | intervals), root=tmp_path)
    assert [checkpoint.step_of(path) for path in checkpoint.paths(run.checkpoints)] == [6, 12]
    assert checkpoint.read(run.checkpoints / "step_00000012").record["best"] == {"step": 6, "loss": 2.0}


def test_a_validation_that_is_not_finite_is_never_the_best(config, tmp_path, monkeypatch):
    losses = iter([float("nan"), 2.0])
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: fake_result(next(losses)))
    run = train(config(train={"steps": 4, "validation_interval": 2}), root=tmp_path)
    assert checkpoint.read(run.checkpoints / "step_00000004").record["best"] == {"step": 4, "loss": 2.0}


def test_log_interval_thins_lines_but_not_validations_flips_or_the_last_step(config, tmp_path):
    changed = config(train={"steps": 11, "log_interval": 5, "validation_interval": 4, "flip_interval": 0})
    run = train(changed, root=tmp_path)
    assert [line["step"] for line in run.metrics()] == [4, 5, 8, 10, 11]


def test_training_works_in_a_thread(config, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(config(train={"steps": 2}), root=tmp_path)))
    thread.start()
    thread.join()
    assert results[0].step == 2


def test_a_dense_model_and_a_document_mask_train_and_resume(config, tmp_path, numbers):
    sections = {"model": {"moe_layers": "none"}, "data": {"document_mask": True}}
    whole = train(config("whole", **sections), root=tmp_path)
    train_until(config("parts", **sections), tmp_path, 3)
    parts = train(config("parts", **sections), root=tmp_path, resume=True)
    assert numbers(parts.metrics()) == numbers(whole.metrics())
    assert all("flip_rate" not in line for line in whole.metrics())


def test_paired_runs_share_batches_and_initial_values(config, tmp_path):
    relu = train(config("relu", train={"steps": 1}), root=tmp_path)
    dense = train(config("dense", model={"moe_layers": "none"}, train={"steps": 1}), root=tmp_path)
    assert relu.metrics()[0]["lm_loss"] == pytest.approx(dense.metrics()[0]["lm_loss"], abs=0.2)


def fake_result(loss):
    return {"loss": loss, "per_domain": {}, "active_experts": None, "others": {}}
