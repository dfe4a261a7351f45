"""The harness runs its own tasks from local files on our models, and its answers are the model's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from remoe.data.chat import EOD_MARK, load_template, save_template
from remoe.errors import CheckpointError, ConfigError, DataError
from remoe.eval.harness import GROUPS, TASKS, HarnessConfig, evaluate_tasks
from remoe.eval.harness.__main__ import without
from remoe.eval.harness.evaluate import stay_offline
from remoe.eval.harness.groups import add_averages, tasks_of
from remoe.eval.harness.tasks import check_rows, write_tasks
from remoe.training.loading import load
from remoe.training.saved import tokenizer_of

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "evals"


@pytest.fixture(scope="module")
def harness():
    stay_offline()
    return pytest.importorskip("lm_eval")


def requests_of(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, place) for place, pair in enumerate(arguments)]


@torch.no_grad()
def by_the_whole_sequence(run, context, continuation):
    """Log-likelihood and greedy flag from all logits of one plain pass."""
    model, tokenizer = load(run.path), tokenizer_of(run.path)
    label = torch.tensor(tokenizer.encode(continuation).tolist())
    context_ids = tokenizer.encode(context).tolist() or [tokenizer.eod]
    ids = torch.tensor([*context_ids, *label.tolist()][-193:])
    log_probs = model(ids[None, :-1]).logits[0, -len(label) :].log_softmax(-1)
    return float(log_probs.gather(1, label[:, None]).sum()), bool((log_probs.argmax(-1) == label).all())


PAIRS = [
    ("Question: What colour is it?\nAnswer:", " red"),
    ("Question: What colour is it?\nAnswer:", " green"),
    ("Question: What colour is it?\nAnswer: ", "red"),
    ("", "Question"),
    ("x" * 400, " and more"),
    ("é", "è"),
]


@pytest.mark.heavy
def test_all_tasks_are_scored_from_local_files_without_a_network(harness, run, data):
    results = evaluate_tasks(run.path, list(TASKS), data, HarnessConfig(device="cpu"))
    assert results["results"].keys() == set(TASKS)
    assert all(scores["sample_len"] == 6 for scores in results["results"].values())
    assert all(0 <= scores["acc,none"] <= 1 for scores in results["results"].values())
    assert all(scores["acc_stderr,none"] >= 0 for scores in results["results"].values())
    assert results["groups"].keys() == set(GROUPS)
    assert results["config"]["model"] == "remoe"
    assert results["config"]["max_length"] == 192
    json.dumps(results, default=str)


@pytest.mark.heavy
def test_a_groups_average_is_the_mean_of_its_tasks_and_has_their_joint_error(harness, run, data):
    results = evaluate_tasks(run.path, ["rmoe_five"], data, HarnessConfig(device="cpu"))
    scores = results["results"]
    assert scores.keys() == {"arc_easy", "hellaswag", "piqa", "sciq", "lambada_openai"}
    keys = [("arc_easy", "acc"), ("hellaswag", "acc_norm"), ("piqa", "acc_norm"), ("sciq", "acc"),
            ("lambada_openai", "acc")]  # fmt: skip
    average = results["groups"]["rmoe_five"]
    assert average["average,none"] == pytest.approx(sum(scores[task][f"{metric},none"] for task, metric in keys) / 5)
    squares = sum(scores[task][f"{metric}_stderr,none"] ** 2 for task, metric in keys)
    assert average["average_stderr,none"] == pytest.approx(squares**0.5 / 5)
    assert average["sample_len"] == 30
    assert "remoe_seven" not in results["groups"]
    assert "rmoe_five" in harness.utils.make_table(results, "groups")


@pytest.mark.heavy
def test_the_harness_gets_the_models_loglikelihoods(harness, run):
    from remoe.eval.harness.model import RemoeLM

    model = RemoeLM(run.path, device="cpu", batch_size="auto")
    answers = model.loglikelihood(requests_of("loglikelihood", *PAIRS), disable_tqdm=True)
    expected = [by_the_whole_sequence(run, *pair) for pair in PAIRS]
    expected[2] = by_the_whole_sequence(run, "Question: What colour is it?\nAnswer:", " red")  # spaces are scored
    assert [total for total, _ in answers] == pytest.approx([total for total, _ in expected], abs=1e-4)
    assert [is_greedy for _, is_greedy in answers] == [is_greedy for _, is_greedy in expected]


@pytest.mark.heavy
def test_a_text_longer_than_the_model_reads_is_scored_once_a_token(harness, run):
    from remoe.eval.harness.model import RemoeLM

    model = RemoeLM(run.path, device="cpu", max_length=16)
    text = "Question: What colour is it? Answer: red"
    (total,) = model.loglikelihood_rolling(requests_of("loglikelihood_rolling", (text,)), disable_tqdm=True)
    by_hand = 0.0
    for start in range(0, len(text), 16):  # each token once; a window reads the token before it
        context = "" if start == 0 else text[:start]
        part = text[start : start + 16]
        model_input = context[-max(1, 17 - len(part)) :]
        by_hand += by_the_whole_sequence(run, model_input, part)[0]
    assert total == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.heavy
def test_conversations_are_written_in_the_template_of_the_run(harness, run, tmp_path):
    from remoe.eval.harness.model import RemoeLM

    shutil.copytree(run.path, tmp_path / "tuned")
    save_template(load_template("chat"), tmp_path / "tuned" / "tokenizer")
    model = RemoeLM(tmp_path / "tuned", device="cpu")
    history = [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "red"}]
    text = model.apply_chat_template([*history, history[0]])
    assert text == f"<|user|>\nColour?\n<|assistant|>\nred{EOD_MARK}\n<|user|>\nColour?\n<|assistant|>\n"
    assert model.tok_encode(text).count(model.eot_token_id) == 1
    assert model.chat_template(True) == load_template("chat").source
    with pytest.raises(CheckpointError, match="has no chat template"):
        RemoeLM(run.path, device="cpu").apply_chat_template(history)


@pytest.mark.heavy
def test_generation_goes_on_greedily_and_ends_before_a_stop_sequence(harness, run):
    from remoe.eval.harness.model import RemoeLM

    model = RemoeLM(run.path, device="cpu", batch_size=2)
    prompts = ("Question: What", "Answer:", "x")
    options = {"until": [], "max_gen_toks": 20}
    whole = model.generate_until(requests_of("generate_until", *((text, options) for text in prompts)), True)
    native, tokenizer = load(run.path), tokenizer_of(run.path)
    for prompt, text in zip(prompts, whole, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt).tolist()])
        expected = native.generate(ids, 20, stop_tokens=tokenizer.eod)[0, ids.shape[1] :].tolist()
        assert text == tokenizer.decode(expected)
    stop = whole[0][5:7]
    (cut,) = model.generate_until(
        requests_of("generate_until", (prompts[0], {"until": [stop], "max_gen_toks": 20})), True
    )
    assert cut == whole[0].split(stop)[0]


@pytest.mark.heavy
def test_examples_come_from_another_split_than_the_one_that_is_scored(harness, data, tmp_path):
    from lm_eval.tasks import TaskManager

    write_tasks(["arc_easy"], data, tmp_path, num_fewshot=2)
    task = TaskManager(include_path=str(tmp_path), include_defaults=False).load(["arc_easy"])["tasks"]["arc_easy"]
    assert [row["question"] for row in task.fewshot_docs()] == [f"What colour is thing {1000 + i}?" for i in range(6)]
    assert [row["question"] for row in task.eval_docs] == [f"What colour is thing {i}?" for i in range(6)]
    assert task.config.metadata["version"] == 1.0


@pytest.mark.heavy
def test_without_other_examples_few_shot_scores_are_refused(harness, run, data):
    with pytest.raises(DataError, match=r"boolq has no examples to show: .*; add boolq_train\.jsonl"):
        evaluate_tasks(run.path, ["boolq"], data, HarnessConfig(num_fewshot=1))
    with pytest.raises(DataError, match=r"lambada_openai has no examples to show: .*; leave out --num-fewshot"):
        evaluate_tasks(run.path, ["lambada_openai"], data, HarnessConfig(num_fewshot=1))


@pytest.mark.heavy
def test_the_harness_s_own_command_line_knows_our_model_and_the_files(run, data, tmp_path):
    pytest.importorskip("lm_eval")
    command = [sys.executable, "-m", "remoe.eval.harness", "--model", "remoe", "--model_args",
               f"pretrained={run.path}", "--device", "cpu", "--tasks", "arc_easy,piqa", "--data", str(data),
               "--num_fewshot", "0", "--output_path", str(tmp_path / "out")]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "|arc_easy|" in done.stdout
    (written,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(written.read_text())["results"].keys() == {"arc_easy", "piqa"}


@pytest.mark.heavy
@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")
def test_the_real_sets_are_read_with_their_sizes(harness, run):
    names = ["arc_easy", "arc_challenge", "boolq", "hellaswag", "lambada_openai", "piqa", "sciq"]
    results = evaluate_tasks(run.path, names, REAL, HarnessConfig(limit=2, device="cpu", max_length=512))
    sizes = {name: count["original"] for name, count in results["n-samples"].items()}
    assert sizes == {"arc_easy": 2376, "arc_challenge": 1172, "boolq": 3270, "hellaswag": 10042,
                     "lambada_openai": 5153, "piqa": 1838, "sciq": 1000}  # fmt: skip


def test_a_task_without_a_file_is_named_with_the_file_that_it_needs(data, tmp_path):
    (tmp_path / "arc_easy_train.jsonl").touch()
    with pytest.raises(DataError, match=r"must hold arc_easy_test\.jsonl or arc_easy_validation\.jsonl"):
        write_tasks(["arc_easy"], tmp_path, tmp_path)
    with pytest.raises(
        ConfigError, match=r"'arc_esy', which cannot be read from local files; .*did you mean 'arc_easy'\?"
    ):
        write_tasks(["arc_esy"], data, tmp_path)
    with pytest.raises(DataError, match="must be a folder"):
        write_tasks(["arc_easy"], tmp_path / "none", tmp_path)


def test_a_file_that_is_there_twice_is_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "race_test.jsonl").touch()
    with pytest.raises(DataError, match=r"holds race_test\.jsonl twice"):
        write_tasks(["race"], tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"rows\.jsonl:2: not valid JSON"),
        ('{"txt": "a"}', r"rows\.jsonl:2: has no key 'text', must have text, choices\.label"),
        ('{"text": "a", "choices": {"text": []}}', r"has no key 'choices\.label'"),
        ("[1]", "has no key 'text'"),
    ],
)
def test_a_row_of_another_form_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "choices": {"label": []}}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        check_rows(path, ("text", "choices.label"))


def test_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"text": "a"}\n\n{"text": "b"}\n', encoding="utf-8")
    check_rows(path, ("text",))


def test_groups_are_the_papers_tasks():
    assert tasks_of(["remoe_seven"]) == [
        "arc_challenge", "arc_easy", "boolq", "hellaswag", "lambada_openai", "piqa", "race",
    ]  # fmt: skip
    assert tasks_of(["arc_easy", "rmoe_five", "own"]) == [
        "arc_easy", "hellaswag", "piqa", "sciq", "lambada_openai", "own",
    ]  # fmt: skip


def test_averages_of_remoe_s_table_come_out():
    percent = {"arc_challenge": 20.22, "arc_easy": 46.68, "boolq": 54.16, "hellaswag": 30.26, "lambada_openai": 35.94,
               "piqa": 63.55, "race": 29.38}  # fmt: skip
    scores = {task: {"acc,none": value, "acc_stderr,none": 1.0, "sample_len": 10} for task, value in percent.items()}
    results = {"results": scores, "configs": {}}
    add_averages(results)
    average = results["groups"]["remoe_seven"]
    assert average["average,none"] == pytest.approx(40.03, abs=0.005)  # ReMoE table 2
    assert average["average_stderr,none"] == pytest.approx(7**-0.5)
    assert average["sample_len"] == 70


def test_options_of_ours_are_taken_out_of_the_harness_s():
    given = ["--tasks", "a", "b", "--limit", "2", "--data=d", "--data", "d", "-t", "c", "--model", "remoe"]
    assert without(given, "--data", "--tasks", "-t") == ["--limit", "2", "--model", "remoe"]
