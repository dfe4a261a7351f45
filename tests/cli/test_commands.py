"""Each command does its job on a tiny run."""

import json
import shutil

import pytest

import remoe as package
from remoe.cli.table import number, table
from remoe.config import describe_keys
from remoe.training import Run, lock
from remoe.training.config import TrainConfig


def test_train_leaves_a_run_with_a_report(remoe, tiny, tmp_path):
    pytest.importorskip("matplotlib")
    outcome = remoe("train", "demo-relu", *tiny, "--set", "name=first")
    assert outcome.code == 0
    assert "runs/first: validation loss" in outcome.out
    assert "report: runs/first/report.html" in outcome.out
    folder = tmp_path / "runs" / "first"
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "report.html"} <= {file.name for file in folder.iterdir()}
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4


def test_train_goes_on_with_more_steps(remoe, tiny, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "runs" / "seen")
    outcome = remoe("train", "demo-relu", *tiny, "--set", "name=seen", "train.steps=6", "--resume", "--no-report")
    assert outcome.code == 0
    assert len((tmp_path / "runs" / "seen" / "metrics.jsonl").read_text().splitlines()) == 6


def test_train_without_matplotlib_says_how_to_get_a_report(remoe, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    outcome = remoe("train", "demo-relu", *tiny, "--set", "name=plain")
    assert outcome.code == 0
    assert "no report: matplotlib is not installed" in outcome.out
    assert "pip install 'remoe[report]'" in outcome.out


def test_keys_lists_every_key_with_default_and_help(remoe):
    text = remoe("train", "--keys").out
    for key, _, help in describe_keys(TrainConfig):
        assert f"{key} = " in text
        assert help in text
    assert "model.vocab_size = null" in text
    assert "train.compile = false" in text


def test_runs_lists_what_is_there_and_its_state(remoe, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "runs" / "group" / "done")
    shutil.copytree(run_folder, tmp_path / "runs" / "cut")
    shutil.rmtree(tmp_path / "runs" / "cut" / "checkpoints" / "step_00000004")
    (tmp_path / "runs" / "odd").mkdir()
    (tmp_path / "runs" / "odd" / "config.yaml").write_text("unknown: 1\n")
    (tmp_path / "runs" / "odd" / "metrics.jsonl").touch()
    shutil.copytree(run_folder, tmp_path / "runs" / "damaged")
    (tmp_path / "runs" / "damaged" / "metrics.jsonl").write_text("no JSON\n")
    shutil.copytree(run_folder, tmp_path / "runs" / "empty")
    (tmp_path / "runs" / "empty" / "config.yaml").write_text("")
    shutil.copytree(run_folder, tmp_path / "runs" / "bare")
    shutil.rmtree(tmp_path / "runs" / "bare" / "checkpoints")
    shutil.copytree(run_folder, tmp_path / "runs" / "live")
    with lock.hold(tmp_path / "runs" / "live"):
        lines = {line.split()[0]: line.split() for line in remoe("runs").out.splitlines()}
    assert lines["group/done"][1:3] == ["finished", "4/4"]
    assert lines["cut"][1] == "interrupted"
    assert lines["odd"][1] == lines["damaged"][1] == lines["empty"][1] == "unreadable"
    assert lines["bare"][1:4] == ["no", "checkpoint", "4/4"]
    assert lines["live"][1:3] == ["running", "4/4"]


def test_runs_reads_the_metrics_of_a_run_once(remoe, run_folder, tmp_path, monkeypatch):
    shutil.copytree(run_folder, tmp_path / "runs" / "done")
    original, read = Run.metrics, []
    monkeypatch.setattr(Run, "metrics", lambda run: read.append(run.path.name) or original(run))
    assert "finished" in remoe("runs").out
    assert read == ["done"]


def test_runs_of_an_empty_folder_says_how_to_make_some(remoe):
    assert "no runs in runs" in remoe("runs").out


def test_diff_shows_settings_and_results_that_differ(remoe, run_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    config = (other / "config.yaml").read_text().replace("seed: 0", "seed: 7")
    (other / "config.yaml").write_text(config)
    lines = {line.split()[0]: line.split()[1:] for line in remoe("runs", "diff", run_folder, other).out.splitlines()}
    assert lines["seed"] == ["0", "7"]
    assert lines["tokens"] == ["256", "256"]
    assert "model.num_layers" not in lines


def test_generate_continues_the_prompt_the_same_way_for_the_same_seed(remoe, run_folder):
    arguments = ("generate", run_folder, "--prompt", "Line", "--max-new-tokens", 8, "--seed", 3)
    first, second = remoe(*arguments), remoe(*arguments)
    assert first.code == 0
    assert first.out == second.out
    assert first.out.startswith("Line")


def test_export_is_a_model_that_loads_with_its_tokenizer(remoe, run_folder, tmp_path):
    outcome = remoe("export", run_folder, "--to", "out")
    assert outcome.code == 0
    names = {file.name for file in (tmp_path / "out").iterdir()}
    for_transformers = {"modeling_remoe.py", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == {"model.safetensors", "config.json", "README.md", "remoe_tokenizer.json"} | for_transformers
    run, export = package.load(run_folder), package.load(tmp_path / "out")
    assert all(value.equal(export.state_dict()[name]) for name, value in run.state_dict().items())
    generated = remoe("generate", "out", "--prompt", "Line", "--max-new-tokens", 4).out
    assert generated == remoe("generate", run_folder, "--prompt", "Line", "--max-new-tokens", 4).out


def test_the_model_card_has_the_figures_of_the_run_up_to_the_exported_step(remoe, run_folder, tmp_path):
    metrics = Run.open(run_folder).metrics()
    remoe("export", run_folder, "--to", "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| validation loss | {metrics[-1]['valid_loss']:.4f} |" in card
    assert f"| active experts a token, validation | {metrics[-1]['valid_active_experts']:.3f} |" in card
    assert "| router | relu |" in card
    assert "at step 4: 256 tokens of `text.txt` in sequences of 16" in card
    assert str(run_folder) not in card
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["sparsity_coef"] == metrics[-1]["sparsity_coef"]
    remoe("export", run_folder / "checkpoints" / "step_00000002", "--to", "early")
    early = (tmp_path / "early" / "README.md").read_text()
    assert "at step 2: 128 tokens" in early
    assert "validation loss" not in early


def test_export_writes_into_no_folder_that_holds_something(remoe, run_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    outcome = remoe("export", run_folder, "--to", "out")
    assert outcome.code == 2
    assert "must be new or empty; --overwrite" in outcome.err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_export_leaves_nothing_behind(remoe, run_folder, tmp_path, monkeypatch, there):
    if there:
        (tmp_path / "out").mkdir()

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("remoe.export.folder.model_card", interrupt)  # all other files are written
        outcome = remoe("export", run_folder, "--to", "out" if there else "new/out")
    assert (outcome.code, outcome.err) == (130, "remoe: interrupted\n")
    assert [path.name for path in tmp_path.rglob("*")] == (["out"] if there else [])
    assert remoe("export", run_folder, "--to", "out").code == 0


def test_an_empty_folder_is_filled_and_not_replaced(remoe, run_folder, tmp_path, monkeypatch):
    """It may be a mount, which cannot be removed, or the folder that a shell is in."""
    (tmp_path / "out").mkdir()
    before = (tmp_path / "out").stat().st_ino
    monkeypatch.chdir(tmp_path / "out")
    assert remoe("export", run_folder, "--to", ".").code == 0
    assert (tmp_path / "out").stat().st_ino == before
    assert 'remoe.load("out")' in (tmp_path / "out" / "README.md").read_text()
    assert not [file.name for file in (tmp_path / "out").iterdir() if file.name.startswith(".")]


def test_an_export_into_a_folder_that_is_there_replaces_its_files(remoe, run_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    assert remoe("export", run_folder, "--to", "out", "--overwrite").code == 0
    assert {"mine", "config.json", "model.safetensors"} <= {file.name for file in (tmp_path / "out").iterdir()}


def test_eval_scores_a_run_and_its_export_alike_on_a_file(remoe, run_folder, tmp_path):
    (tmp_path / "held.txt").write_text("\n".join(f"Some text number {i}, to be scored." for i in range(60)))
    remoe("export", run_folder, "--to", "out")
    length = ("--data", "held.txt", "--sequences", 1000, "--sequence-length", 16, "--json")
    scores = [json.loads(remoe("eval", path, *length, "--device", "cpu").out) for path in (run_folder, "out")]
    assert scores[0]["total"] == pytest.approx(scores[1]["total"], rel=1e-6)
    assert scores[0]["total"]["tokens"] > 1000
    assert "bits/byte" in remoe("eval", run_folder, "--device", "cpu").out


def test_analyze_writes_the_report_where_it_is_told(remoe, run_folder, tmp_path):
    pytest.importorskip("matplotlib")
    outcome = remoe("analyze", run_folder, "--to", tmp_path / "look.html")
    assert outcome.code == 0
    assert outcome.out == f"report: {tmp_path / 'look.html'}\n"
    assert "<svg" in (tmp_path / "look.html").read_text()


def test_plan_gives_published_sizes_as_json_and_as_text(remoe):
    plan = json.loads(remoe("plan", "remoe-182m-relu", "--json").out)
    assert plan["parameters"] == {"total": 777_087_744, "active": 182_545_152}
    assert plan["flops_per_token"] * 1024 / 1e9 == pytest.approx(995.359, abs=1e-3)
    assert plan["memory"]["total"] > 16 * plan["parameters"]["total"]
    assert "777,087,744" in remoe("plan", "remoe-182m-relu").out


def test_plan_takes_the_vocabulary_of_the_tokenizer_where_the_config_has_none(remoe):
    small = json.loads(remoe("plan", "demo-relu", "--json").out)["parameters"]["total"]
    fixed = json.loads(remoe("plan", "demo-relu", "--set", "model.vocab_size=257", "--json").out)
    assert fixed["parameters"]["total"] == small


def test_recipes_lists_names_with_their_origin_and_shows_one(remoe, tmp_path):
    assert "remoe-978m-relu" in remoe("recipes").out
    (tmp_path / "own.yaml").write_text(remoe("recipes", "show", "demo-topk").out)
    assert remoe("plan", "own.yaml").out == remoe("plan", "demo-topk").out


def test_compare_prints_a_table_with_intervals_and_names_its_report(remoe, tiny, tmp_path):
    pytest.importorskip("matplotlib")
    command = ("compare", "demo-relu", "--routers", "relu,dense", "--seeds", "0,1", "--name", "c", *tiny)
    outcome = remoe(*command)
    assert outcome.code == 0
    header, relu, dense = outcome.out.splitlines()[-6:-3]
    assert header.split("  ")[0] == "router"
    assert "95 % interval" in header
    assert relu.split()[0] == "relu"
    assert " to " in dense
    assert outcome.out.splitlines()[-1] == "report: runs/c/report.html"
    assert (tmp_path / "runs" / "c" / "comparison.json").is_file()


def test_compare_with_one_seed_says_that_there_is_no_interval(remoe, tiny):
    outcome = remoe("compare", "demo-relu", "--routers", "relu,dense", "--name", "c", *tiny)
    assert "one seed: no interval; --seeds 0,1,2 gives one" in outcome.out


def test_demo_prints_losses_unigram_and_sparsity_and_names_the_report(remoe, tiny):
    pytest.importorskip("matplotlib")
    outcome = remoe("demo", *tiny)
    assert outcome.code == 0
    for text in ("relu ", "topk ", "dense ", "unigram model: validation loss", "(target 0.7500)"):
        assert text in outcome.out
    assert outcome.out.splitlines()[-1] == "report: runs/demo/report.html"


def test_table_aligns_columns_and_shows_missing_numbers_as_a_dash():
    text = table(("name", "loss"), [("a", number(1.5, ".2f")), ("long", number(None, ".2f"))])
    assert text == "name  loss\na     1.50\nlong     -"
    assert number(float("nan"), ".2f") == "-"
