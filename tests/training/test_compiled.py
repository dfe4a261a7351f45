"""Facts about the compiled training step, with the aot_eager backend: whole graphs, no code generation."""

import functools
import itertools
from typing import Any

import pytest
import torch

from remoe.model import ReMoEForCausalLM
from remoe.training.step import Stepper


@pytest.fixture(autouse=True)
def without_code_generation(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def steppers_of(config, **sections) -> list[Stepper]:
    """Eager and compiled."""
    steppers = []
    for on in (False, True):
        changes = {**sections, "train": {"micro_batch_size": 2, "compile": on} | sections.get("train", {})}
        built = config(**changes | {"model": {"vocab_size": 256} | sections.get("model", {})})
        steppers.append(Stepper(built, ReMoEForCausalLM(built.model, seed=1), torch.device("cpu")))
    return steppers


ROUTERS, PRECISIONS, CHECKPOINTING = ("relu", "topk", "recurrent_relu"), ("fp32", "bf16"), ("none", "full", "selective")
QUICK = {
    ("relu", "fp32", "none"), ("relu", "bf16", "selective"), ("topk", "fp32", "full"), ("topk", "bf16", "none"),
    ("recurrent_relu", "fp32", "selective"), ("recurrent_relu", "bf16", "full"),
}  # fmt: skip
"""Each router in both precisions, each way of checkpointing too; a compilation takes seconds."""


def combinations() -> list[Any]:
    """All of them; those that are not quick are marked slow."""
    every = itertools.product(ROUTERS, PRECISIONS, CHECKPOINTING)
    return [pytest.param(*values, marks=() if values in QUICK else pytest.mark.slow) for values in every]


@pytest.mark.parametrize(("router", "precision", "checkpointing"), combinations())
def test_steps_are_one_graph_that_is_compiled_once_with_the_eager_steps_values(
    config, batch, router, precision, checkpointing
):
    train = {"precision": precision, "activation_checkpointing": checkpointing}
    eager, compiled = steppers_of(config, model={"router": router}, train=train)
    for step in (1, 2, 3):
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            values, others = eager.run(batch, step), compiled.run(batch, step)
        assert values.keys() == others.keys()
        for name, value in values.items():
            torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_row_capacities_stay_in_the_graph_and_a_change_compiles_once(config, batch):
    eager, compiled = steppers_of(config)
    for step, capacities in enumerate((None, (128, 128), (64, 2), None, (128, 128)), 1):
        eager.row_capacities = compiled.row_capacities = capacities
        with torch._dynamo.config.patch(error_on_recompile=step > 3):
            values, others = eager.run(batch, step), compiled.run(batch, step)
        assert bool(others["overflowed"]) == bool(values["overflowed"]) == (step >= 3)
        torch.testing.assert_close(others["loss"], values["loss"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "sections",
    [
        {"sparsity": {"loads": "previous_step", "density_floor": 0.5, "revival_coef": 0.01}},
        {"losses": {"router_z_coef": 0.1}, "model": {"router": "cosine"}},
        {"model": {"router": "expert_choice"}},
        {"model": {"moe_layers": "none"}, "data": {"document_mask": True}},
        {"model": {"block": "post_norm", "dropout": 0.0, "attention_span": 8, "num_kv_heads": 2}},
    ],
    ids=str,
)
def test_every_kind_of_term_and_model_is_one_graph(config, batch, sections):
    eager, compiled = steppers_of(config, **sections)
    for step in (1, 2):
        values, others = eager.run(batch, step), compiled.run(batch, step)
        torch.testing.assert_close(others["loss"], values["loss"], rtol=1e-4, atol=1e-6)
