"""A comparison trains what is missing, keeps what is there, and pairs by seed."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

import remoe
from remoe.errors import CheckpointError, ConfigError, TrainingError
from remoe.recipes.comparison import compare
from remoe.recipes.plan import Plan
from remoe.recipes.results import differences, is_finished, late_mean, median_speed
from remoe.training import Run, lock


@pytest.fixture
def plan(tiny_overrides):
    return Plan(name="c", config="demo-relu", routers=["relu", "dense"], seeds=[0, 1], overrides=tiny_overrides)


@pytest.fixture
def said():
    return []


def test_comparison_pairs_losses_by_seed(plan, said, tmp_path):
    result = compare(plan, root=tmp_path, say=said.append)
    relu, dense = result.rows
    losses = {run.name: Run.open(run).valid_loss for run in result.runs}
    paired = [losses[f"dense-seed{seed}"] - losses[f"relu-seed{seed}"] for seed in (0, 1)]
    assert relu.difference is None
    assert dense.difference.mean == pytest.approx(sum(paired) / 2, abs=1e-12)
    assert dense.difference.low < min(paired) < max(paired) < dense.difference.high
    assert dense.valid_loss.mean == pytest.approx((losses["dense-seed0"] + losses["dense-seed1"]) / 2, abs=1e-12)
    assert 0 < relu.active_experts < 4
    assert dense.active_experts is None
    assert "start with the same values, bit for bit (2 seeds)" in said[0]
    written = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert written["rows"][1]["difference"]["mean"] == dense.difference.mean
    assert written["runs"]["c/relu-seed1"]["valid_loss"] == losses["relu-seed1"]


def test_balance_of_every_arm_is_shown_and_what_each_differs_in(tiny_overrides, said, tmp_path):
    plan = Plan(name="c", config="demo-relu", routers=["topk", "relu", "dense"], overrides=tiny_overrides)
    result = compare(plan, root=tmp_path, say=said.append)
    topk, relu, dense = result.rows
    assert topk.load_balancing_coef == pytest.approx(0.01)
    assert relu.load_balancing_coef == 0
    assert min(topk.load_balancing, relu.load_balancing) > 0.9
    assert dense.load_balancing is None
    written = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert written["equal"] == "steps"
    assert written["differs"]["topk"] == {}
    assert written["differs"]["relu"] == {"model.router": ["topk", "relu"]}
    assert set(written["differs"]["dense"]) == {"model.moe_layers", "model.router"}  # the latter is not used there


def test_runs_of_equal_flops_compute_as_much_as_the_first_router_did(tiny_overrides, said, tmp_path):
    overrides = (*tiny_overrides, "train.steps=12", "train.checkpoint_interval=12")
    plan = Plan(name="c", config="demo-relu", routers=["relu", "topk"], overrides=overrides, equal="flops")
    result = compare(plan, root=tmp_path, say=said.append)
    relu, topk = result.rows
    one_step = relu.training_flops / 12
    assert abs(topk.training_flops - relu.training_flops) < one_step  # the dense start of ReLU routing is paid back
    assert [path.name for path in result.runs] == ["relu-seed0", "topk-seed0-equal-flops"]
    assert Run.open(result.runs[1]).step > 12
    written = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert set(written["differs"]["topk"]) == {"model.router", "train.steps"}
    again = compare(plan, root=tmp_path, say=said.append)
    assert again.rows == result.rows


def test_finished_runs_are_not_trained_again_and_interrupted_ones_go_on(plan, said, tmp_path):
    result = compare(plan, root=tmp_path, say=said.append)
    stamps = {run: (run / "metrics.jsonl").stat().st_mtime_ns for run in result.runs}
    halfway = result.runs[-1]
    lines = (halfway / "metrics.jsonl").read_text()
    _forget_the_end(halfway)
    assert not is_finished(Run.open(halfway), 3)
    again = compare(plan, root=tmp_path, say=said.append)
    assert again.rows[0].valid_loss == result.rows[0].valid_loss
    assert again.rows[1].valid_loss == result.rows[1].valid_loss
    assert {run for run in result.runs if (run / "metrics.jsonl").stat().st_mtime_ns != stamps[run]} == {halfway}
    assert len((halfway / "metrics.jsonl").read_text().splitlines()) == len(lines.splitlines())
    assert "3 of 4 runs are finished and stay" in said


def test_finished_run_with_other_settings_is_refused_and_kept(plan, tmp_path):
    result = compare(plan, root=tmp_path, say=lambda _: None)
    before = (result.runs[0] / "metrics.jsonl").read_bytes()
    other = dataclasses.replace(plan, overrides=(*plan.overrides, "optimizer.lr=0.5"))
    with pytest.raises(CheckpointError, match=r"optimizer\.lr = 0\.001, not 0\.5.*--overwrite"):
        compare(other, root=tmp_path, say=lambda _: None)
    assert (result.runs[0] / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routers": ["relu"]}, "--routers names relu alone, must name at least two to compare; train one with"),
        ({"overrides": ["model.router=topk"]}, r"--set model.router=topk is at odds with the routers .*relu, dense"),
        ({"overrides": ["model.router.name=topk"]}, r"--set model.router.name=topk is at odds"),
    ],
)
def test_comparison_of_nothing_is_refused_before_anything_is_written(plan, tmp_path, changes, message):
    changed = dataclasses.replace(plan, config=str(tmp_path / "own.yaml"), **changes)
    (tmp_path / "own.yaml").write_text("model: {router: {name: relu}}\ntrain: {device: cpu}\n")
    with pytest.raises(ConfigError, match=message):
        compare(changed, root=tmp_path / "runs", say=lambda _: None)
    assert not (tmp_path / "runs").exists()


def test_comparison_inside_a_run_is_refused_and_the_run_left_alone(plan, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.yaml").write_text("name: c\n")
    with pytest.raises(ConfigError, match=r"c is a run; choose another name"):
        compare(plan, root=tmp_path, say=lambda _: None)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("devices", [[], ["cpu"]])
def test_comparison_whose_run_is_being_trained_starts_nothing(plan, tmp_path, devices):
    with lock.hold(tmp_path / "c" / "dense-seed1"):
        with pytest.raises(ConfigError, match=r"dense-seed1 is being trained by process \d+; wait for it"):
            compare(plan, root=tmp_path, devices=devices, overwrite=True, say=lambda _: None)
        assert [path.name for path in (tmp_path / "c").iterdir()] == ["dense-seed1"]


def test_trained_models_share_initial_values_and_see_the_same_tokens(tiny_overrides, tmp_path):
    still = (*tiny_overrides, "optimizer.lr=0", "optimizer.min_lr=0", "train.steps=1")
    plan = Plan(name="c", config="demo-relu", routers=["relu", "topk", "dense"], overrides=still)
    runs = compare(plan, root=tmp_path, say=lambda _: None).runs
    relu, topk, dense = (dict(remoe.load(run).named_parameters()) for run in runs)
    assert relu.keys() == topk.keys()
    assert all(relu[name].equal(topk[name]) for name in relu)
    shared = relu.keys() & dense.keys()
    assert len(shared) == 3 + 2 * 6
    assert all(relu[name].equal(dense[name]) for name in shared)


def test_runs_in_processes_give_the_same_losses_as_runs_here(plan, said, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one_seed = dataclasses.replace(plan, seeds=[0])
    apart = compare(one_seed, root=tmp_path / "apart", devices=["cpu", "cpu"], say=said.append)
    here = compare(one_seed, root=tmp_path / "here", say=lambda _: None)
    assert [row.valid_loss.mean for row in apart.rows] == pytest.approx(
        [r.valid_loss.mean for r in here.rows], abs=1e-6
    )
    assert {"c/relu-seed0: finished", "c/dense-seed0: finished"} <= set(said)
    assert "step 4/4" in (tmp_path / "apart" / "c" / "logs" / "relu-seed0.log").read_text()


def test_run_that_fails_in_its_process_is_named_with_its_log(plan, tmp_path):
    broken = dataclasses.replace(plan, seeds=[0], overrides=(*plan.overrides, "model.vocab_size=7"))
    with pytest.raises(TrainingError, match=r"2 of 2 runs failed.*relu-seed0.*vocab_size is 7.*relu-seed0\.log"):
        compare(broken, root=tmp_path, devices=["cpu"], say=lambda _: None)


def test_late_mean_is_over_the_last_quarter_of_the_steps(tmp_path):
    run = _run_with_metrics(tmp_path, [{"step": step, "tokens": step, "sparsity": step / 10} for step in range(1, 9)])
    assert late_mean(run.metrics(), "sparsity") == pytest.approx((0.7 + 0.8) / 2)
    assert late_mean(run.metrics(), "absent") is None


def test_speed_is_the_median_of_the_late_steps(tmp_path):
    speeds = [1, 1, 1, 1, 1, 1, 1, 1, 1, 10, 30, 20]
    run = _run_with_metrics(
        tmp_path, [{"step": i + 1, "tokens": 0, "tokens_per_second": speed} for i, speed in enumerate(speeds)]
    )
    assert median_speed(run.metrics()) == 20


def test_differences_are_dotted_keys_with_both_values():
    before = {"a": 1, "b": {"c": 2, "d": 3}, "only": 4}
    after = {"a": 1, "b": {"c": 5, "d": 3}, "new": 6}
    assert differences(before, after) == {"b.c": (2, 5), "only": (4, None), "new": (None, 6)}


def _forget_the_end(run):
    """As if the run had been killed after its checkpoint at step 2."""
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]))


def _run_with_metrics(path, records):
    (path / "config.yaml").write_text("name: x\n")
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Run.open(path)


def test_interrupting_the_comparison_interrupts_its_runs_which_save_and_go_on(tiny_overrides, tmp_path):
    overrides = [part for setting in (*tiny_overrides, "train.steps=5000") for part in ("--set", setting)]
    command = [
        sys.executable, "-m", "remoe", "compare", "demo-relu", "--routers", "relu,topk", "--name", "c",
        "--devices", "cpu,cpu", "--root", str(tmp_path), *overrides,
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        paths = [tmp_path / "c" / f"{router}-seed0" for router in ("relu", "topk")]
        _wait_until(lambda: all(_has_stepped(path) for path in paths), process)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "remoe: stopped; the runs are saved, and the same command goes on"
    for path in paths:
        run = Run.open(path)
        assert 0 < run.step < 5000
        assert (run.checkpoints / f"step_{run.step:08d}").is_dir()


def _has_stepped(run):
    return (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0


def _wait_until(is_true, process):
    deadline = time.monotonic() + 120
    while not is_true():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
