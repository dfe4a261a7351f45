"""The commands of the pages on evaluation and fine-tuning, executed as written."""

import json
from pathlib import Path

import pytest

from remoe.training.run import Run
from tests.docs.conftest import blocks, run_line


@pytest.mark.slow
@pytest.mark.heavy
def test_the_page_on_evaluation_ends_with_the_harness_s_results(tmp_path: Path):
    pytest.importorskip("lm_eval")
    for command in "".join(blocks("how-to/evaluate.md", "sh")).splitlines():
        run_line(command, tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert scores["results"]["piqa"]["sample_len"] == 2


@pytest.mark.slow
def test_the_page_on_fine_tuning_ends_with_a_tuned_run(tmp_path: Path):
    for command in "".join(blocks("how-to/fine-tune.md", "sh")).splitlines():
        run_line(command, tmp_path)
    run = Run.open(tmp_path / "runs" / "tuned")
    assert run.step == 3
    assert run.config.model == Run.open(tmp_path / "runs" / "base").config.model
    assert (run.path / "tokenizer" / "chat_template.jinja").is_file()
