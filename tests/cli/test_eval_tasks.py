"""`remoe eval --tasks`: a table with standard errors, the harness's JSON, and options that belong together."""

import json

import pytest


@pytest.fixture
def data(tmp_path):
    rows = [
        {"goal": f"Paint {i}.", "sol1": "Use a brush.", "sol2": "Eat the paint.", "label": i % 2} for i in range(4)
    ]  # fmt: skip
    folder = tmp_path / "evals"
    folder.mkdir()
    (folder / "piqa_validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.heavy
def test_tasks_are_a_table_with_sizes_and_errors_and_a_file_of_the_harness(remoe, run_folder, data, tmp_path):
    pytest.importorskip("lm_eval")
    outcome = remoe("eval", run_folder, "--tasks", "piqa", "--data", data, "--sequence-length", 64, "--device", "cpu",
                    "--output", tmp_path / "new" / "scores.json")  # fmt: skip
    assert outcome.code == 0
    header, *rows = (line.split() for line in outcome.out.splitlines())
    assert header == ["task", "split", "shots", "n", "metric", "value", "std.", "error"]
    assert [row[:5] for row in rows] == [["piqa", "validation", "0", "4", metric] for metric in ("acc", "acc_norm")]
    written = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert f"{written['results']['piqa']['acc,none']:.4f}" == rows[0][5]
    assert f"{written['results']['piqa']['acc_stderr,none']:.4f}" == rows[0][6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--limit", 3), "--limit needs --tasks"),
        (("--output", "scores.json"), "--output needs --tasks"),
        (("--sequence-length", 8), "--sequence-length needs --data or --tasks"),
        (("--tasks", "piqa", "--sequences", 3), "--sequences is for text, must be left out with --tasks"),
        (("--tasks", "piqua", "--data", "."), "did you mean 'piqa'?"),
        (
            ("--tasks", "nonsense", "--data", "."),
            "local files; with --data it must be one of arc_challenge, arc_easy, ",
        ),
        (("--tasks", "nonsense", "--data", "."), "winogrande, remoe_seven, rmoe_five"),
        (("--tasks", ",", "--data", "."), "--tasks names no task"),
        (("--tasks", "piqa", "--output", "."), "--output is ., a folder, must be a file"),
        (("--tasks", "piqa", "--data", "gone"), "--data is gone, must be a folder with a jsonl file a task"),
    ],
)
def test_options_that_do_not_go_together_are_refused(remoe, run_folder, options, message):
    outcome = remoe("eval", run_folder, *options)
    assert outcome.code == 2
    assert message in outcome.err


@pytest.mark.heavy
@pytest.mark.parametrize(("task", "fix"), [("piqua", "did you mean 'piqa'?"), ("@@@", "try --tasks piqa")])
def test_a_task_that_there_is_not_leads_to_those_there_are(remoe, run_folder, task, fix):
    pytest.importorskip("lm_eval")
    outcome = remoe("eval", run_folder, "--tasks", task, "--device", "cpu")
    assert outcome.code == 2
    allowed = "must name tasks of lm-evaluation-harness (`lm_eval ls tasks` lists them) or the groups remoe_seven and"
    assert outcome.err.startswith(f"remoe: --tasks names {task!r}, {allowed}")
    assert outcome.err.endswith(f"; {fix}\n")


def test_without_the_harness_it_says_how_to_get_it(remoe, run_folder, data, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for options in (("--data", data), ()):
        outcome = remoe("eval", run_folder, "--tasks", "piqa", *options)
        assert outcome.code == 2
        assert "lm_eval is not installed; it comes with: pip install 'remoe[eval]'" in outcome.err
