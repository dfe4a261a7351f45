"""Training on several processes gives the numbers of one: cases_numbers.py."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.cases_numbers import COMPILED, ROUTERS, STAGES, TOLERANCE

pytestmark = pytest.mark.xdist_group("distributed")
ROUNDING = 4
"""A whole run may be this many times as far from one process's as that is from itself with one bit of noise."""


@pytest.fixture
def results(results_of: Callable[..., Any]) -> dict[str, Any]:
    return results_of(
        2,
        "some_steps",
        "rounded",
        "variants",
        "known_rows",
        "ahead",
        "averaged",
        "runs",
        "coefficients",
        "poisoned",
        "void",
    )


def check(everyone: list[dict[str, Any]], num_cases: int) -> None:
    """Loss, every gradient, counts and coefficient of every case, on every rank."""
    for found in everyone:
        assert len(found) == num_cases * len(STAGES)
        for case, step in found.items():
            assert step["lacking"] == [], case
            assert step["counts"], case
            assert step["coef"] == step["expected_coef"], case
            for value in ("loss", "lm_loss", "grad_norm", "weights"):
                assert step[value] < TOLERANCE, (case, value)
            error, name = step["gradient"]
            assert error < TOLERANCE, (case, name)


def test_loss_and_every_gradient_of_two_processes_are_those_of_one_in_all_three_stages(results: dict[str, Any]):
    check(results["some_steps"], num_cases=12 + 7 + 4)


def test_in_bf16_gradients_are_those_of_one_process_with_the_same_micro_batches(results: dict[str, Any]):
    for found in results["rounded"]:
        assert found.keys() == STAGES.keys()
        for case, step in found.items():
            assert step["lacking"] == [], case
            assert step["gradient"][0] < TOLERANCE, (case, step["gradient"][1])
            assert step["loss"] < TOLERANCE, case


def test_ranks_that_share_the_optimizer_tie_embeddings_and_reduce_in_the_dtype_that_is_asked_for(
    results: dict[str, Any],
):
    for found in results["variants"]:
        errors = {name: step["gradient"][0] for name, step in found.items()}
        assert all(errors[name] < TOLERANCE for name in ("tied", "copies"))
        assert all(TOLERANCE < errors[name] < 0.02 for name in ("bf16", "bf16, copies")), "rounding to bf16 shows"


def check_known_rows(everyone: list[dict[str, Any]], num_layouts: int) -> None:
    for found in everyone:
        check([found], num_cases=2 * num_layouts)
        for case, step in found.items():
            assert step["overflowed"] is False, case
            assert step["void_with_less"] == [True, True], case


def test_experts_of_many_ranks_that_wait_for_no_counts_give_the_numbers_of_one_process(results: dict[str, Any]):
    check_known_rows(results["known_rows"], num_layouts=3)


def test_a_run_with_row_capacities_at_shared_experts_is_the_exact_run(results: dict[str, Any]):
    for found in results["ahead"]:
        assert found["capacity"] == pytest.approx(found["exact"], rel=1e-3)
        assert len(found["exact"]) == 40
        assert found["with_capacity"] >= 15
    again = {found["again"] for found in results["ahead"]}
    assert len(again) == 1, "all ranks run the same steps again"
    assert again.pop() >= 1


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_experts_of_four_ranks_that_wait_for_no_counts_do_too(results_of: Callable[..., Any]):
    check_known_rows(results_of(4, "known_rows", timeout=900)["known_rows"], num_layouts=7)


def test_the_states_are_from_all_three_stages(results: dict[str, Any]):
    stages = {name: step for name, step in results["some_steps"][0].items() if name.startswith("relu, shards, ")}
    dense, sparser, sparse = (stages[f"relu, shards, {stage}"] for stage in STAGES)
    assert math.exp(dense["coef"]) < 1e-4, "the L1 term does not act yet"
    assert math.exp(sparser["coef"]) > 1, "it does now, and late: a wrong load factor would show"
    assert dense["sparsity"] < 0.55 < 0.65 < sparse["sparsity"]


def test_gradients_averaged_over_ranks_would_be_seen(results: dict[str, Any]):
    assert all(error > 0.1 for error in results["averaged"])


@pytest.mark.parametrize("router", ROUTERS)
def test_whole_runs_are_no_further_apart_than_rounding_takes_them(results: dict[str, Any], router: str):
    for found in results["runs"]:
        one, noisy, many = found[router]["losses"]
        by_noise = max(abs(a - b) for a, b in zip(one, noisy, strict=True))
        assert max(abs(a - b) for a, b in zip(one, many, strict=True)) <= ROUNDING * by_noise
        assert one[-1] < one[0] - 1, "it learned something"


def test_all_ranks_have_one_coefficient_after_whole_runs_and_after_a_thousand_steps(results: dict[str, Any]):
    for found in results["coefficients"]:
        assert found["found"] == found["expected"] == results["coefficients"][0]["found"]
    for router in ROUTERS:
        assert len({coef for found in results["runs"] for coef in found[router]["coefs"]}) == 1


def test_nan_on_one_rank_skips_the_step_on_all(results: dict[str, Any]):
    for found in results["poisoned"]:
        assert found == {"skipped": 1, "changed": ["progress.skipped", "progress.skipped_in_a_row"], "next": 0}


def test_a_step_that_is_void_for_want_of_rows_on_one_rank_leaves_no_trace_on_any(results: dict[str, Any]):
    assert results["void"] == [{"overflowed": True, "changed": []}] * 2


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize(("num_processes", "num_layouts"), [(2, 11), (4, 14)])
def test_every_router_in_every_layout_has_the_numbers_of_one_process(
    results_of: Callable[..., Any], num_processes: int, num_layouts: int
):
    found = results_of(num_processes, "all_steps", "averaged", timeout=1500)
    check(found["all_steps"], num_cases=3 * num_layouts * 2)
    assert all(error > 0.1 for error in found["averaged"])


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize(("num_processes", "num_layouts"), [(2, 1), (4, 5)])
def test_every_router_in_pipelines_has_the_numbers_of_one_process(
    results_of: Callable[..., Any], num_processes: int, num_layouts: int
):
    found = results_of(num_processes, "pipelined_steps", timeout=1500)
    check(found["pipelined_steps"], num_cases=3 * num_layouts * 2)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_compiled_parts_have_the_same_numbers_and_layers_share_their_graphs(results_of: Callable[..., Any]):
    results = results_of(2, "compiled_steps", "compiled_known_rows", timeout=900)
    everyone = results["compiled_steps"]
    for found in everyone:
        check([{case: step for layout in found.values() for case, step in layout["steps"].items()}], len(COMPILED))
    for found in results["compiled_known_rows"]:
        assert all(case["step"]["gradient"][0] < TOLERANCE for case in found.values())
        assert found["known"]["graphs"] == 1, "the whole pass"
        assert all(case["own seconds"] > 0 for case in found.values())
    graphs = {layout: found["graphs"] for layout, found in everyone[0].items()}
    attention, router, first_recurrent_router, whole = 1, 1, 1, 1
    before_exchange = attention, router
    after_exchange = 1
    assert graphs == {
        "relu, shards": attention + router,
        "recurrent_relu, shards": attention + router + first_recurrent_router,
        "relu, experts": attention + router,
        "relu, tensor": router,
        "relu, pipeline": attention + router,
        "relu, optimizer": whole,
        "recurrent_relu, optimizer and experts": (sum(before_exchange) + after_exchange) * (1 + first_recurrent_router),
    }
