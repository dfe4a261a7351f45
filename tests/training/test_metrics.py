"""Facts about metrics.jsonl and about how a line is made."""

import json

import pytest
import torch

from remoe.errors import CheckpointError
from remoe.training import recorder
from remoe.training.metrics import MetricsFile, cut_back, read_metrics
from remoe.training.progress import SilentReporter
from remoe.training.readout import Readout
from remoe.training.recorder import Recorder, summarise
from remoe.training.sinks import Sinks


def test_nan_and_infinity_are_written_as_null_at_any_depth(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"step": 1, "loss": float("nan"), "layers": {"x": [1.0, float("inf")]}})
    text = (tmp_path / "metrics.jsonl").read_text()  # on disk before the file is closed
    file.close()
    assert text == '{"step": 1, "loss": null, "layers": {"x": [1.0, null]}}\n'


def test_cutting_back_drops_later_lines_and_a_half_written_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    cut_back(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    cut_back(path, 0)
    assert path.read_text() == ""


def test_steps_that_come_to_count_together_share_their_time_and_pauses_are_nobodys(config, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(recorder.time, "perf_counter", lambda: now[0])
    built = config()
    made = Recorder(built, MetricsFile(tmp_path / "metrics.jsonl"), Sinks(lambda text: None), SilentReporter())
    zero = Readout({name: torch.tensor(0.0) for name in ("lm_loss", "skipped", "skipped_in_a_row")})

    def finish(steps: list[int], seconds: float) -> None:
        now[0] += seconds
        made.time_steps(len(steps), wait=False)
        for step in steps:
            made.count_step()
            with made.paused():
                now[0] += 100.0  # a validation
            if step != 4:  # not logged: the next line's steps are two
                made.log(step, zero, lr=0.0, measured={})

    finish([1], 5.0)
    finish([2, 3], 3.0)
    finish([4], 1.0)
    finish([5], 2.0)
    made.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["step_seconds"]) for line in lines] == [(1, 5.0), (2, 1.5), (3, 1.5), (5, 1.5)]
    tokens = built.train.batch_size * built.data.sequence_length
    assert [line["tokens_per_second"] for line in lines] == [tokens / 5.0] + [tokens / 1.5] * 3


@pytest.mark.parametrize("line", ["\0\0\0", "[1]", '{"loss": 1.0}'])
def test_a_damaged_line_is_named_and_nothing_is_cut(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    before = path.read_bytes()
    for look in (read_metrics, lambda path: cut_back(path, 1)):
        with pytest.raises(CheckpointError, match=r"metrics.jsonl:2 is damaged"):
            look(path)
    assert path.read_bytes() == before


def test_floats_survive_the_file_bit_for_bit(tmp_path):
    value = 0.1 + 0.2
    file = MetricsFile(tmp_path / "m")
    file.write({"step": 1, "loss": value})
    file.close()
    assert json.loads((tmp_path / "m").read_text())["loss"] == value


COUNTS = {"without_expert": [1.0, 0.0], "idle_experts": [0.0, 2.0], "max_tokens": [3.0, 4.0], "tokens": [4.0, 4.0]}


def test_sparsity_is_over_moe_layers_only():
    # TV3d: 2 of 4 layers are MoE, each at .875
    numbers = COUNTS | {"active": [4.0, 4.0], "total": [32.0, 32.0], "skipped": 0.0, "lm_loss": 1.0}
    line = summarise(numbers, {"step": 1}, "paper")
    assert line["sparsity"] == 0.875
    assert line["active_experts"] == 1.0
    assert line["layers"]["no_expert"] == [0.25, 0.0]
    assert line["layers"]["idle_experts"] == [0, 2]
    assert line["layers"]["max_load"] == [0.75, 1.0]


def test_sparsity_of_ranks_and_micro_batches_is_that_of_their_summed_counts():
    # TV3e: [[.9, .8], [.85, .95]] with equal totals
    active = sum(200 * (1 - s) for s in (0.9, 0.8, 0.85, 0.95))
    numbers = COUNTS | {"active": [active, 0.0], "total": [800.0, 0.0], "skipped": 0.0}
    assert summarise({k: v[:1] if isinstance(v, list) else v for k, v in numbers.items()}, {"step": 1}, "paper")[
        "sparsity"
    ] == pytest.approx(0.875)


@pytest.mark.parametrize(("mode", "expected"), [("paper", 2.43125), ("released", 4.8625)])
def test_the_l1_term_adds_up_over_layers_as_in_the_objective(mode, expected):
    line = summarise({"sparsity_l1": [3.06875, 1.79375], "skipped": 0.0}, {"step": 1}, mode)
    assert line["sparsity_l1"] == pytest.approx(expected)
    assert line["layers"]["sparsity_l1"] == [3.06875, 1.79375]


def test_a_dense_models_line_has_null_for_what_it_does_not_have():
    line = summarise({"skipped": 2.0, "loss": 1.0}, {"step": 1}, "paper")
    missing = ("sparsity", "sparsity_coef", "sparsity_l1", "load_balancing", "active_experts")
    assert [line[key] for key in missing] == [None] * 5
    assert line["skipped"] == 2
    assert line["layers"] == {}


def test_coefficients_of_layers_are_listed_and_averaged():
    line = summarise({"skipped": 0.0, "sparsity_coef": [1.0, 3.0]}, {"step": 1}, "paper")
    assert line["sparsity_coef"] == 2.0
    assert line["layers"]["sparsity_coef"] == [1.0, 3.0]
