"""Our log-likelihoods are those of the harness's HFLM on the exported model, request by request."""

import pytest

from remoe.data.tokenizer import BytesTokenizer
from remoe.eval.harness import TASKS, write_tasks
from remoe.eval.harness.evaluate import stay_offline
from remoe.model import ReMoEConfig, ReMoEForCausalLM

SMALL = {"vocab_size": 257, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
         "intermediate_size": 32, "num_experts": 4, "init_std": 0.2}  # fmt: skip
MODELS = [
    {"router": "relu"},
    {"router": "topk", "top_k": 2, "tie_embeddings": True},
    {"router": "rmoe"},
    {"router": "recurrent_relu"},
    {"moe_layers": "none"},
]


@pytest.fixture
def hflm():
    stay_offline()
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    return pytest.importorskip("lm_eval.models.huggingface").HFLM


def all_requests(data, folder):
    from lm_eval.tasks import TaskManager

    write_tasks(list(TASKS), data, folder)
    tasks = TaskManager(include_path=str(folder), include_defaults=False).load(list(TASKS))["tasks"].values()
    for task in tasks:
        task.set_config("num_fewshot", 0)
        task.build_all_requests()
    return [request for task in tasks for request in task.instances]


@pytest.mark.heavy
@pytest.mark.parametrize("keys", MODELS, ids=str)
def test_every_request_of_every_task_has_hflm_s_loglikelihood(hflm, keys, data, tmp_path):
    import remoe.hf  # noqa: F401  knows the exported classes
    from remoe.eval.harness.model import RemoeLM
    from remoe.export import write_export

    model = ReMoEForCausalLM(ReMoEConfig(**(SMALL | keys)), seed=5)
    write_export(model.eval(), BytesTokenizer(), tmp_path / "export", None, None, 5e9)
    (tmp_path / "tasks").mkdir()
    requests = all_requests(data, tmp_path / "tasks")
    ours = RemoeLM(tmp_path / "export", device="cpu", max_length=160).loglikelihood(requests, disable_tqdm=True)
    theirs = hflm(pretrained=str(tmp_path / "export"), device="cpu", batch_size=8, max_length=160, dtype="float32")
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    assert [total for total, _ in ours] == pytest.approx([total for total, _ in expected], abs=1e-4)
    assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in expected]
    assert len(requests) > 100


@pytest.mark.heavy
def test_whole_texts_have_hflm_s_loglikelihood(hflm, tmp_path):
    from lm_eval.api.instance import Instance

    import remoe.hf  # noqa: F401
    from remoe.eval.harness.model import RemoeLM
    from remoe.export import write_export

    write_export(ReMoEForCausalLM(ReMoEConfig(**SMALL)).eval(), BytesTokenizer(), tmp_path, None, None, 5e9)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("short", "longer " * 30)]
    ours = RemoeLM(tmp_path, device="cpu", max_length=32).loglikelihood_rolling(requests, disable_tqdm=True)
    theirs = hflm(pretrained=str(tmp_path), device="cpu", batch_size=8, max_length=32, dtype="float32")
    assert ours == pytest.approx(theirs.loglikelihood_rolling(requests, disable_tqdm=True), abs=1e-4)


@pytest.mark.heavy
def test_an_export_is_read_as_far_as_it_was_trained(run, tmp_path):
    pytest.importorskip("lm_eval")
    from remoe.data import load_saved_tokenizer
    from remoe.eval.harness.model import RemoeLM
    from remoe.export import write_export
    from remoe.training.loading import load

    write_export(load(run.path), load_saved_tokenizer(run.path / "tokenizer"), tmp_path, run, 4, 5e9)
    assert RemoeLM(tmp_path, device="cpu").max_length == run.config.data.sequence_length
