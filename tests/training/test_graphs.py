"""Facts about steps whose micro-batches are graphs; on a CPU with a stand-in that runs what a graph would replay."""

import pytest
import torch

from remoe.errors import ConfigError
from remoe.model import ReMoEForCausalLM
from remoe.training import load, step, train, trainer
from remoe.training.graphs import Captured, GraphedPass, copied, copy_into
from remoe.training.step import Stepper
from tests.training.test_ahead import ALL, NONE, Rows

PLENTY = (128, 128)


class Replay:
    """Stands in for a CUDA graph: reads its inputs and writes its outputs where it was captured."""

    def __init__(self, run, inputs, measured) -> None:
        self.run, self.inputs, self.measured = run, inputs, measured

    def replay(self) -> None:
        copy_into(self.measured, self.run(*self.inputs))


@pytest.fixture
def captures(monkeypatch) -> list:
    """The capacities of each capture."""
    made = []

    def capture(graphed: GraphedPass, capacities, batch, weighing) -> Captured:
        made.append(capacities)
        inputs = copied((batch, weighing))
        measured = graphed._run(*inputs)
        graphed._forget()
        return Captured(capacities, Replay(graphed._run, inputs, measured), inputs, measured)

    monkeypatch.setattr(step, "check_capturable", lambda *_: None)
    monkeypatch.setattr(GraphedPass, "_capture", capture)
    return made


def stepper_of(config, **sections) -> Stepper:
    built = config(**{**sections, "model": {"vocab_size": 256} | sections.get("model", {})})
    return Stepper(built, ReMoEForCausalLM(built.model, seed=1), torch.device("cpu"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sparsity", [{}, {"loads": "previous_step"}], ids=str)
def test_replayed_steps_are_the_eager_ones_and_a_change_of_capacities_captures_anew(
    config, batch, captures, precision, sparsity
):
    train_section = {"precision": precision, "micro_batch_size": 1}
    eager = stepper_of(config, train=train_section, sparsity=sparsity)
    graphed = stepper_of(config, train=train_section | {"cuda_graphs": True}, sparsity=sparsity)
    schedule = (None, PLENTY, PLENTY, (100, 100), None, (100, 100))
    for number, capacities in enumerate(schedule, 1):
        eager.row_capacities = graphed.row_capacities = capacities
        values, others = eager.run(batch, number), graphed.run(batch, number)
        assert [name for name in values if not torch.equal(values[name], others[name])] == []
    assert captures == [PLENTY, (100, 100), (100, 100)]  # a step with exact rows gives the graph's memory back
    state, expected = graphed.tensors(), eager.tensors()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


def test_gradients_stay_where_the_graph_adds_to_them(config, batch, captures):
    stepper = stepper_of(config, train={"cuda_graphs": True, "micro_batch_size": 2})
    stepper.row_capacities = PLENTY
    stepper.run(batch, 1)
    places = [weight.grad.data_ptr() for weight in stepper.weights.values()]
    stepper.run(batch, 2)
    assert [weight.grad.data_ptr() for weight in stepper.weights.values()] == places


def test_a_run_of_graphs_with_void_steps_is_the_exact_one(config, tmp_path, numbers, monkeypatch, captures):
    whole = train(config("whole", train={"micro_batch_size": 1}), root=tmp_path)
    monkeypatch.setattr(trainer, "row_policy", lambda _: Rows(ALL, NONE, ALL, ALL, NONE))
    sections = {"train": {"micro_batch_size": 1, "rows": "capacity", "cuda_graphs": True}}
    graphed = train(config("graphed", **sections), root=tmp_path)
    assert numbers(graphed.metrics()) == numbers(whole.metrics())
    for name, tensor in load(whole.path).state_dict().items():
        assert torch.equal(tensor, load(graphed.path).state_dict()[name]), name
    assert len(captures) > 2


def test_a_dense_model_is_captured_once(config, batch, captures):
    stepper = stepper_of(config, model={"moe_layers": "none"}, train={"cuda_graphs": True})
    for number in (1, 2):
        stepper.run(batch, number)
    assert captures == [()]


def test_what_cannot_be_captured_is_a_clear_error(config):
    with pytest.raises(ConfigError, match=r"train.cuda_graphs is true, must be false on device cpu"):
        stepper_of(config, train={"cuda_graphs": True})
    with pytest.raises(ConfigError, match=r"train.cuda_graphs is true, needs train.rows auto or capacity"):
        config(train={"cuda_graphs": True, "rows": "exact"})
    lory = stepper_of(config, model={"router": "lory"})
    with pytest.raises(ConfigError, match="must be false with router 'lory' and swiglu experts"):
        step.check_capturable(torch.device("cuda"), lory.layers)
