"""The commands and the Python of the pages, executed as written, one after the other."""

import json
from pathlib import Path

import pytest

from remoe.training.run import Run
from tests.docs.conftest import blocks, run_line, run_page, run_python


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_tutorial_ends_with_an_export_that_loads(tmp_path: Path):
    commands = "".join(blocks("tutorial.md", "sh")).splitlines()
    assert [command.split()[1] for command in commands if command.startswith("remoe")] == [
        "train", "runs", "train", "analyze", "eval", "generate", "compare", "export",
    ]  # fmt: skip
    for command in commands:
        run_line(command, tmp_path)
    assert Run.open(tmp_path / "runs" / "first").step == 40
    assert (tmp_path / "runs" / "first" / "report.html").is_file()
    run_python("tutorial.md", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_text_with_domains_is_trained_on_as_it_is_and_prepared(tmp_path: Path):
    for command in "".join(blocks("how-to/train-on-your-text.md", "sh")).splitlines():
        run_line(command, tmp_path)
    runs = [Run.open(tmp_path / "runs" / name) for name in ("mine", "prepared")]
    for run in runs:
        assert run.step == 8
        assert set(run.metrics()[-1]["valid_loss_per_domain"]) == {"even", "odd"}
    assert (tmp_path / "mine.yaml").read_text(encoding="utf-8").startswith("# Ours, for two CPU cores")


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.timeout(3000)
def test_the_story_of_text_and_of_a_top_k_model_runs_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    data = Path(__file__).resolve().parents[3] / "shared" / "data"
    for folder in ("pile6", "evals"):
        if not (data / folder).is_dir():
            pytest.skip(f"needs {data / folder}")
        (tmp_path / folder).symlink_to(data / folder)
    run_page("story.md", tmp_path)
    curve = json.loads((tmp_path / "olmoe-tuned" / "density.json").read_text(encoding="utf-8"))
    (chosen,) = [point for point in curve["points"] if (point["kind"], point["target"]) == ("per_layer", 1)]
    assert chosen["active_experts"] == pytest.approx(1, abs=0.1)
    config = json.loads((tmp_path / "olmoe-sparser" / "config.json").read_text(encoding="utf-8"))
    assert config["thresholds"] == chosen["thresholds"]
    assert "The density dial" in (tmp_path / "olmoe-tuned" / "report.html").read_text(encoding="utf-8")


def test_a_router_written_as_the_page_says_learns(tmp_path: Path):
    run_python("how-to/add-a-router.md", tmp_path)


def test_the_example_of_moving_over_is_the_recipe_it_names(tmp_path: Path):
    from remoe.recipes import read_config

    (command,) = blocks("how-to/move-over.md", "sh")
    words = command.split()
    assert words[:2] == ["remoe", "plan"]
    assert words[3] == "--set"
    assert read_config(words[2], words[4:]) == read_config(words[2])
