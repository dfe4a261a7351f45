"""Facts about training on a GPU."""

import pytest
import torch

from remoe.data import Batch
from remoe.model import ReMoEForCausalLM
from remoe.moe import dispatch, layer
from remoe.training import checkpoint, load, train
from remoe.training.readout import Readout
from remoe.training.step import Stepper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def stepper_of(config, **sections) -> Stepper:
    built = config(**{**sections, "model": {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64}
                      | sections.get("model", {})})  # fmt: skip
    return Stepper(built, ReMoEForCausalLM(built.model, seed=1), torch.device("cuda"))


@pytest.fixture
def waiting_dispatch(monkeypatch):
    """Lets the dispatch plan wait for its number of rows, as its reference does; nothing else may."""

    def plan(routing_map_TE):
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        result = dispatch.plan(routing_map_TE)
        torch.cuda.set_sync_debug_mode(mode)
        return result

    monkeypatch.setattr(layer, "plan", plan)


@pytest.mark.usefixtures("waiting_dispatch")
@pytest.mark.parametrize(("layers", "precision"), [("none", "fp32"), ("none", "bf16"), ("all", "bf16")])
def test_a_steady_step_does_not_wait_for_the_device(config, batch, layers, precision):
    stepper = stepper_of(config, model={"moe_layers": layers}, train={"precision": precision, "micro_batch_size": 2})
    for step in (1, 2):
        Readout(stepper.run(batch, step))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        readouts = [Readout(stepper.run(batch, step)) for step in (3, 4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(readout.read()["loss"] > 0 for readout in readouts)


def test_a_step_that_is_not_finite_leaves_everything_alone(config, batch):
    stepper = stepper_of(config)
    stepper.run(batch, 1)
    state = {name: value.detach().clone() for name, value in stepper.tensors().items()}
    with torch.no_grad():
        saved = stepper.model.lm_head.weight[0, 0].clone()
        stepper.model.lm_head.weight[0, 0] = float("inf")
    stepper.run(batch, 2)
    with torch.no_grad():
        stepper.model.lm_head.weight[0, 0] = saved
    changed = {name for name, value in stepper.tensors().items() if not torch.equal(value, state[name])}
    assert changed == {"progress.skipped", "progress.skipped_in_a_row"}


def test_gpu_and_cpu_agree_on_loss_and_counts(config, batch):
    built = config(model={"vocab_size": 256})
    results = []
    for device in ("cpu", "cuda"):
        stepper = Stepper(built, ReMoEForCausalLM(built.model, seed=1), torch.device(device))
        results.append({name: value.cpu() for name, value in stepper.run(Batch(*batch), 1).items()})
    torch.testing.assert_close(results[0]["loss"], results[1]["loss"], rtol=1e-4, atol=1e-5)
    assert abs(int(results[0]["active"].sum()) - int(results[1]["active"].sum())) <= 2


def test_a_run_on_the_gpu_resumes_there_and_loads_on_the_cpu(config, tmp_path, numbers):
    sections = {"model": {"moe_layers": "none"}, "train": {"device": "cuda", "steps": 6, "validation_interval": 3}}
    whole = train(config("whole", **sections), root=tmp_path)
    shorter = {**sections, "train": sections["train"] | {"steps": 3}, "optimizer": {"schedule": "constant"}}
    longer = {**shorter, "train": sections["train"]}
    train(config("parts", **shorter), root=tmp_path)
    parts = train(config("parts", **longer), root=tmp_path, resume=True)
    straight = train(config("straight", **longer), root=tmp_path)
    assert [line["step"] for line in whole.metrics()] == [1, 2, 3, 4, 5, 6]
    for line, other in zip(parts.metrics(), straight.metrics(), strict=True):
        assert line["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-4)
    assert next(load(parts.path).parameters()).device.type == "cpu"


def test_compiled_training_matches_eager(config, batch):
    eager, compiled = (stepper_of(config, train={"compile": on}) for on in (False, True))
    for step in (1, 2):
        values, others = eager.run(batch, step), compiled.run(batch, step)
        torch.testing.assert_close(others["loss"], values["loss"], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_checkpoint_of_another_gpu_than_the_current_one_holds_what_was_there_then(tmp_path):
    tensors = {f"weight{i}": torch.full((32, 1024, 1024), float(i), device="cuda:1") for i in range(8)}
    for step in range(1, 4):
        for tensor in tensors.values():
            tensor.add_(1)
        saved = checkpoint.write(tmp_path, tensors, {"step": step})
        read_back = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        saved.load(read_back)
        assert [name for name, tensor in tensors.items() if not torch.equal(tensor, read_back[name])] == []
