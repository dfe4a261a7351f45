"""Facts about steps whose rows are allocated ahead, and about their exact re-run when those did not suffice."""

import itertools
from collections.abc import Sequence

import pytest
import torch

from remoe.errors import ConfigError
from remoe.model import ReMoEForCausalLM
from remoe.training import Run, load, train, trainer
from remoe.training.ahead import RunAhead, row_policy
from remoe.training.capacity import WINDOW
from remoe.training.signals import RunStoppedError
from remoe.training.step import Stepper
from tests.training.test_loop import StopAfter

NONE, ALL = (0, 0), (64, 64)
"""Rows of two layers for micro-batches of one sequence with 16 tokens and 4 experts: far too few, and any number."""


class Rows:
    """A policy that gives the launched steps these capacities in turn, and all rows after them."""

    def __init__(self, *capacities: Sequence[int] | None) -> None:
        self.given = 0
        self.seen: list[list[int]] = []
        self._capacities = itertools.chain(capacities, itertools.repeat(ALL))

    @property
    def capacities(self) -> Sequence[int] | None:
        self.given += 1
        return next(self._capacities)

    def see(self, active_L: list[int]) -> None:
        self.seen.append(active_L)


DROPOUT = {"block": "post_norm", "dropout": 0.3, "attention_span": 8, "num_kv_heads": 2}
MIXER = {"router": "sparsemixer"}
SECTIONS = {"train": {"micro_batch_size": 1, "rows": "capacity"}}


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Run:
    """The run whose rows are exact."""
    return train(config("whole", train={"micro_batch_size": 1}), root=tmp_path_factory.mktemp("runs"))


@pytest.fixture
def with_rows(monkeypatch):
    """Train with a given policy."""

    def patch(*capacities: Sequence[int] | None) -> Rows:
        rows = Rows(*capacities)
        monkeypatch.setattr(trainer, "row_policy", lambda _: rows)
        return rows

    return patch


def assert_same_runs(run: Run, other: Run, numbers) -> None:
    assert numbers(run.metrics()) == numbers(other.metrics())
    for name, tensor in load(run.path).state_dict().items():
        assert torch.equal(tensor, load(other.path).state_dict()[name]), name


@pytest.mark.parametrize(
    "capacities",
    [
        [NONE],  # the first step
        [ALL, ALL, NONE],  # at a measurement of flips
        [ALL, ALL, ALL, NONE],  # at a validation and a checkpoint
        [ALL, NONE, NONE],  # two in a row, the first at a checkpoint
        [NONE, NONE],
        [ALL] * 5 + [NONE],  # the last step
        [NONE] * 6,
        [None, (64, 0), None, (0, 64)],  # one layer alone; an exact step after a void one
    ],
    ids=str,
)
def test_a_run_with_void_steps_is_bit_for_bit_the_exact_one(config, tmp_path, numbers, with_rows, whole, capacities):
    rows = with_rows(*capacities)
    again = train(config("again", **SECTIONS), root=tmp_path)
    assert_same_runs(again, whole, numbers)
    assert rows.given == len(rows.seen) == 6
    assert [line["skipped"] for line in again.metrics()] == [0] * 6


@pytest.mark.parametrize("model", [DROPOUT, MIXER], ids=["dropout", "drawn experts"])
def test_a_step_that_is_run_again_draws_the_same_random_numbers(config, tmp_path, numbers, with_rows, model):
    sections = {"model": model, "train": {"micro_batch_size": 2, "checkpoint_interval": 5, "validation_interval": 5}}
    whole = train(config("whole", **sections), root=tmp_path)
    with_rows(ALL, (1, 1), ALL, ALL, (1, 1), (1, 1))
    assert_same_runs(train(config("again", **sections), root=tmp_path), whole, numbers)


@pytest.mark.parametrize("sparsity", [{"average": 0.5}, {"per_layer": True}, {"loads": "previous_step"}], ids=str)
def test_controllers_and_loads_do_not_see_void_steps(config, tmp_path, numbers, with_rows, sparsity):
    whole = train(config("whole", sparsity=sparsity, train={"micro_batch_size": 1}), root=tmp_path)
    with_rows(ALL, NONE, ALL, ALL, NONE, ALL)
    assert_same_runs(train(config("again", sparsity=sparsity, **SECTIONS), root=tmp_path), whole, numbers)


def test_the_running_state_of_routers_does_not_see_void_steps(config, tmp_path, numbers, with_rows):
    model = {"router": {"name": "topk", "warmup_steps": 4}}
    whole = train(config("whole", model=model, train={"micro_batch_size": 1}), root=tmp_path)
    with_rows(ALL, ALL, NONE, ALL, NONE, NONE)
    assert_same_runs(train(config("again", model=model, **SECTIONS), root=tmp_path), whole, numbers)


def test_a_void_step_after_resuming_leaves_the_run_as_it_would_have_been(config, tmp_path, numbers, with_rows):
    sections = {"train": SECTIONS["train"] | {"log_interval": 2}}
    whole = train(config("whole", **sections), root=tmp_path)
    with_rows(ALL, ALL, NONE)  # the signal comes in the void step
    with StopAfter(3), pytest.raises(RunStoppedError, match="after step 3"):
        train(config("parts", **sections), root=tmp_path)
    with_rows(NONE, ALL, NONE)
    parts = train(config("parts", **sections), root=tmp_path, resume=True)
    assert_same_runs(parts, whole, numbers)


def test_a_void_step_and_the_one_launched_meanwhile_leave_no_trace_on_the_device(config, batch):
    stepper = stepper_of(config)
    stepper.run(batch, 1)
    state = {name: value.clone() for name, value in stepper.tensors().items()}
    stepper.row_capacities = NONE
    stepper.run(batch, 2)
    stepper.row_capacities = (128, 128)
    stepper.run(batch, 3)
    assert bool(stepper.overflowed)
    assert [name for name, value in stepper.tensors().items() if not torch.equal(value, state[name])] == []


def test_a_step_counts_when_the_next_one_is_launched_and_exact_ones_at_once(config, batch):
    stepper = stepper_of(config)
    ahead = RunAhead(stepper, stepper.run, Rows())
    assert ahead.launch(batch, 1) == []
    assert [launched.step for launched in ahead.launch(batch, 2)] == [1]
    assert [launched.step for launched in ahead.settle()] == [2]
    assert [launched.step for launched in RunAhead(stepper, stepper.run, None).launch(batch, 3)] == [3]


def test_on_a_cpu_rows_are_exact_unless_asked_for(config):
    assert row_policy(stepper_of(config)) is None
    assert row_policy(stepper_of(config, train={"rows": "exact"})) is None
    assert row_policy(stepper_of(config, train={"rows": "capacity", "micro_batch_size": 2})).most == 2 * 16 * 4
    assert row_policy(stepper_of(config, train={"rows": "capacity"}, model={"moe_layers": "none"})) is None


def test_the_policy_of_a_run_settles_on_capacities_that_hold_its_counts(config, batch):
    stepper = stepper_of(config, train={"rows": "capacity", "steps": 60}, optimizer={"lr": 1e-4, "min_lr": 1e-4})
    policy = row_policy(stepper)
    ahead = RunAhead(stepper, stepper.run, policy)
    given = []
    for step in range(1, WINDOW + 10):
        given.append(policy.capacities)
        ahead.launch(batch, step)
    assert given[:WINDOW] == [None] * WINDOW
    assert all(capacity <= 4 * 8 * 4 for capacity in given[-1])
    assert not bool(stepper.overflowed)


def test_another_word_for_rows_is_a_clear_error(config):
    with pytest.raises(
        ConfigError, match=r"train.rows is 'exakt', must be one of auto, exact, capacity; did you mean 'exact'"
    ):
        config(train={"rows": "exakt"})


def stepper_of(config, **sections) -> Stepper:
    built = config(**{**sections, "model": {"vocab_size": 256} | sections.get("model", {})})
    return Stepper(built, ReMoEForCausalLM(built.model, seed=1), torch.device("cpu"))
