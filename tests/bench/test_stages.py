"""benchmarks/stages.py adds up what the dense start costs a run."""

import importlib.util
import json
from pathlib import Path

import pytest

from remoe.errors import ConfigError

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("stages", ROOT / "benchmarks" / "stages.py")
stages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stages)

MODEL = {"model": "one", "candidate": "relu"}


def recorded(folder: Path, sparsity: list[float | None], router: str = "relu") -> None:
    folder.mkdir(parents=True)
    config = (ROOT / "results" / "pile6" / "relu-seed0" / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("router: relu", f"router: {router}"))
    losses = {"sparsity_coef": 1e-8, "sparsity_l1": 1.0, "lm_loss": 2.0}
    rows = [{"step": step, "tokens": step, "sparsity": value} | losses for step, value in enumerate(sparsity, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_steps_until_the_target_count_by_the_experts_that_were_on(tmp_path: Path):
    recorded(tmp_path / "runs" / "relu-seed0", [0.5, 0.5, 0.6875, 0.9, 0.6])
    recorded(tmp_path / "runs" / "topk-seed0", [0.5, 0.9], "topk")
    recorded(tmp_path / "never", [0.5, 0.5])
    recorded(tmp_path / "gaps", [0.5, None, 0.9])
    for name, row in (("a.json", {"phase": "start", "step_ms": 300}), ("b.json", {"phase": "steady", "step_ms": 100})):
        (tmp_path / name).write_text(json.dumps({"benchmark": "model", "rows": [MODEL | row, {"kind": "ratio"}]}))
    found = stages.stages([tmp_path / "a.json", tmp_path / "b.json"], tmp_path)
    (run,) = found["runs"]
    assert (run["run"], run["steps"]) == ("runs/relu-seed0", 3)
    assert run["dense_steps"] == 2.5, "half of 8 experts, for 1 + 1 + 0.5 steps"
    assert (run["most_experts"], run["most_experts_from_50"]) == (4.0, 1.0)
    (row,) = found["rows"]
    assert row == {
        "model": "one",
        "start_step": 3,
        "paper": pytest.approx(2 * 110 / 60_000),
        "runs_least": pytest.approx(2 * 2.5 / 60_000),
        "runs_most": pytest.approx(2 * 2.5 / 60_000),
    }


def test_what_is_missing_is_a_clear_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no run of the ReLU router under .* logged each step"):
        stages.stages([], tmp_path)
    recorded(tmp_path / "relu-seed0", [0.5, 0.9])
    with pytest.raises(ConfigError, match="no model has both phases, start and steady"):
        stages.stages([], tmp_path)
    (tmp_path / "layer.json").write_text('{"benchmark": "layer", "rows": []}')
    (tmp_path / "text.json").write_text("no JSON")
    for name in ("layer.json", "text.json", "missing.json"):
        with pytest.raises(ConfigError, match=rf"{name} is not what `remoe bench model --json FILE` writes"):
            stages.stages([tmp_path / name], tmp_path)


def test_the_file_is_what_the_results_give():
    models = sorted((ROOT / "results" / "gpu").glob("model_*.json"))
    kept = json.loads((ROOT / "results" / "gpu" / "stages.json").read_text())
    assert stages.stages(models, ROOT / "results") == kept, "run python benchmarks/stages.py"
    assert kept["runs"]
