"""Models cut into stages: cases_pipeline.py."""

from collections.abc import Callable
from typing import Any

import pytest

from remoe.model import ReMoEConfig, ReMoEForCausalLM
from remoe.model.part import keep_part, layers_of_part
from tests.distributed.cases_numbers import LENGTH, TOLERANCE

pytestmark = pytest.mark.xdist_group("distributed")


@pytest.fixture
def results(results_of: Callable[..., Any]) -> dict[str, Any]:
    return results_of(2, "awkward", "closed", "held_out", "gathers")


def check(step: dict[str, Any], case: str) -> None:
    """One step of the pipeline is that of one process."""
    assert step["lacking"] == [], case
    assert step["counts"], case
    assert step["coef"] == step["expected_coef"], case
    assert max(step[value] for value in ("loss", "lm_loss", "grad_norm", "weights")) < TOLERANCE, case
    error, name = step["gradient"]
    assert error < TOLERANCE, (case, name)


def test_what_all_stages_share_and_stages_without_experts_change_no_number(results: dict[str, Any]):
    for found in results["awkward"]:
        assert len(found) == 10 + 2
        for case, step in found.items():
            check(step, case)


def test_a_stage_without_any_active_expert_goes_on_like_any_other(results: dict[str, Any]):
    for step in results["closed"]:
        check(step, "closed")
        assert step["sparsity"] > 0.5, "half of the layers have no active expert"


def test_validation_and_flips_of_a_pipeline_are_those_of_one_process(results: dict[str, Any]):
    for alone, stages in results["held_out"]:
        assert stages["labels"] == alone["labels"]
        assert stages["loss"] == pytest.approx(alone["loss"], rel=TOLERANCE)
        assert stages["active_experts"] == pytest.approx(alone["active_experts"], abs=0.01)
        assert alone["flip_rate"] > 0
        assert stages["flip_rate"] == pytest.approx(alone["flip_rate"], abs=0.005)


def test_a_stage_gathers_its_units_and_reduces_their_gradients_as_often_as_plans_say(results: dict[str, Any]):
    for found in results["gathers"]:
        units, root = found["True"]["units"], 1
        assert found["True"]["gathered"] == (8 + 1) * units + root, "a time for each of 8 micro-batches, and one more"
        assert found["False"]["gathered"] == units + root
        assert [counts["reduced"] for counts in found.values()] == [units + root] * 2
        assert found["True"]["received"] == 8 * 4 * (LENGTH * 16 + 1), "16 numbers a token, and the loss, in fp32"


def test_layers_are_spread_evenly_and_the_last_stage_has_no_more_than_others():
    assert [len(layers_of_part(10, 4, index)) for index in range(4)] == [3, 3, 2, 2]
    assert [layer for index in range(4) for layer in layers_of_part(10, 4, index)] == list(range(10))


def test_parts_have_the_names_of_the_whole_and_together_all_of_them():
    config = ReMoEConfig(
        vocab_size=16, hidden_size=8, num_layers=3, num_heads=2, intermediate_size=4, num_experts=2,
        router={"name": "recurrent_relu", "state_size": 4},
    )  # fmt: skip
    whole, parts = ReMoEForCausalLM(config), [ReMoEForCausalLM(config) for _ in range(3)]
    for index, part in enumerate(parts):
        keep_part(part, layers_of_part(3, 3, index))
    names = [set(dict(part.named_parameters())) for part in parts]
    assert names[0] | names[1] | names[2] == set(dict(whole.named_parameters()))
    assert {name.split(".")[1] for name in names[0] & names[2]} == {"router_cell"}
    assert "lm_head.weight" not in names[1] | names[0]


@pytest.mark.slow
def test_four_stages_have_the_numbers_of_one_process(results_of: Callable[..., Any]):
    for found in results_of(4, "awkward", timeout=280)["awkward"]:
        for case, step in found.items():
            check(step, case)
