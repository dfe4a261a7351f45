"""A device without memory: one line that says in what, and what needs less; the run goes on where it was saved."""

import pytest
import torch

from remoe.training import Run
from remoe.training.step import Stepper

FAR_TOO_MUCH = 10**15


@pytest.fixture
def arguments(tiny):
    return ("train", "demo-relu", *tiny, "--set", "name=big", "--no-report")


def test_a_step_without_memory_is_one_line_and_the_run_goes_on_with_less(remoe, arguments, tmp_path, monkeypatch):
    run = Stepper.run

    def run_or_fail(stepper, batch, step):
        return torch.empty(FAR_TOO_MUCH) if step == 4 else run(stepper, batch, step)

    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "run", run_or_fail)
        outcome = remoe(*arguments)
    assert outcome.code == 1
    assert outcome.err.startswith(
        "remoe: the CPU ran out of memory in step 4, with micro-batches of 4 x 16 tokens, which asked for "
    )
    assert outcome.err.endswith(
        "set train.micro_batch_size below 4 or train.activation_checkpointing=full (`remoe plan` estimates what a "
        "config takes), --resume goes on after step 2\n"
    )
    assert outcome.err.count("\n") == 1
    resumed = remoe(*arguments, "--resume", "--set", "train.micro_batch_size=2")
    assert resumed.code == 0
    assert [row["step"] for row in Run.open(tmp_path / "runs" / "big").metrics()] == [1, 2, 3, 4]


def test_a_gpus_own_error_is_told_in_the_same_way(remoe, arguments, monkeypatch):
    def fail(stepper, batch, step):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of ..."
        )

    monkeypatch.setattr(Stepper, "run", fail)
    outcome = remoe(*arguments, "--set", "train.micro_batch_size=1", "--set", "train.activation_checkpointing=full")
    assert outcome.code == 1
    assert (
        "the GPU ran out of memory in step 1, with micro-batches of 1 x 16 tokens, which asked for 2.50 GiB more"
        in (outcome.err)
    )
    assert "set a smaller data.sequence_length or model" in outcome.err
    assert "--resume starts again" in outcome.err


def test_a_validation_without_memory_says_so(remoe, arguments, monkeypatch):
    monkeypatch.setattr("remoe.training.trainer.evaluate", lambda *model, **more: torch.empty(FAR_TOO_MUCH))
    outcome = remoe(*arguments)
    assert outcome.code == 1
    assert "remoe: the CPU ran out of memory in the validation after step 4" in outcome.err


def test_scoring_without_memory_names_the_options_that_need_less(remoe, run_folder, monkeypatch):
    monkeypatch.setattr("remoe.eval.held_out.evaluate", lambda *model, **more: torch.empty(FAR_TOO_MUCH))
    outcome = remoe("eval", run_folder, "--device", "cpu", "--batch-size", 5)
    assert outcome.code == 1
    assert "the CPU ran out of memory in scoring 5 sequences at once, which asked for" in outcome.err
    assert outcome.err.endswith("lower --batch-size or --sequence-length\n")
    assert outcome.err.count("\n") == 1


def test_any_other_command_without_memory_is_one_line_too(remoe, run_folder, monkeypatch):
    def fail(*model, **more):
        raise MemoryError

    monkeypatch.setattr("remoe.model.generate.stream_tokens", fail)
    outcome = remoe("generate", run_folder, "--device", "cpu")
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)
    assert "the CPU ran out of memory in this command; give it less at a time" in outcome.err


def test_another_runtime_error_keeps_its_traceback(remoe, run_folder, monkeypatch):
    def fail(*model, **more):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("remoe.model.generate.stream_tokens", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        remoe("generate", run_folder, "--device", "cpu")
