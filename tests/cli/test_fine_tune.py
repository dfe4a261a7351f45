"""Fine-tuning on the command line: the plan of a run that starts from another, and answers through its template."""

import json
import shutil

from remoe.data.chat import ChatTemplate, save_template


def test_chat_answers_what_follows_the_rendered_prompt(remoe, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "tuned")
    template = "{% for m in messages %}Q: {{ m.content }} {% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    save_template(ChatTemplate(template), tmp_path / "tuned" / "tokenizer")
    options = ("--max-new-tokens", 6, "--temperature", 0)
    answer = remoe("generate", "tuned", "--chat", "--prompt", "who?", *options)
    assert answer.code == 0
    assert answer.out.startswith("Q: who? A:")
    assert answer.out == remoe("generate", "tuned", "--prompt", "Q: who? A:", *options).out


def test_chat_needs_a_run_that_was_fine_tuned(remoe, run_folder):
    outcome = remoe("generate", run_folder, "--chat", "--prompt", "who?")
    assert outcome.code == 2
    assert "has no chat template, must be fine-tuned on conversations" in outcome.err


def test_the_plan_of_a_fine_tuning_run_is_that_of_the_model_it_starts_from(remoe, run_folder):
    origin = json.loads(remoe("plan", run_folder / "config.yaml", "--json").out)
    tuned = json.loads(remoe("plan", "rmoe-alpaca", "--set", f"train.init_from={run_folder}", "--json").out)
    assert tuned["parameters"] == origin["parameters"]
    assert tuned["workload"]["sequence_length"] == 512
