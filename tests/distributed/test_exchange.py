"""Expert parallelism of one layer on two processes: cases_exchange.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from remoe.distributed.expert_parallel import _slots
from remoe.moe.dispatch import DispatchPlan, plan
from tests.distributed.cases_exchange import OPEN
from tests.distributed.test_ranks import CASES

pytestmark = pytest.mark.xdist_group("distributed")
TOLERANCE = 1e-5


@pytest.fixture
def results(results_of: Callable[..., Any]) -> dict[str, Any]:
    return results_of(2, *CASES)


@pytest.mark.parametrize("routing", OPEN)
def test_shared_experts_give_the_output_and_gradients_of_one_process(results: dict[str, Any], routing: str):
    for rank in results["exchange"]:
        wrong = {name: value for name, value in rank[routing].items() if not value < TOLERANCE}
        assert not wrong


@pytest.mark.parametrize("routing", OPEN)
def test_a_second_exchange_has_the_same_bits(results: dict[str, Any], routing: str):
    for rank in results["exchange"]:
        assert {name: value for name, value in rank[routing].items() if name.endswith("again") and value != 0} == {}


@pytest.mark.parametrize("room", ["just enough", "more"])
@pytest.mark.parametrize("routing", OPEN)
def test_an_exchange_that_waits_for_nothing_gives_the_same_output_and_gradients(
    results: dict[str, Any], routing: str, room: str
):
    for rank in results["with_capacity"]:
        wrong = {name: value for name, value in rank[f"{routing}, {room}"].items() if not value < TOLERANCE}
        assert not wrong


@pytest.mark.parametrize("routing", OPEN)
def test_ranks_know_together_what_a_capacity_must_hold_and_when_it_does_not(results: dict[str, Any], routing: str):
    ranks = [rank[routing] for rank in results["reported"]]
    needed = ranks[0]["needed"]
    assert [rank["exact"] for rank in ranks] == [{"needs": needed, "overflow": None}] * 2
    for case, is_too_much in {"enough": False, "few rows": True, "few pairs": True}.items():
        said = [rank[case] for rank in ranks if case in rank]
        assert any(rank["overflow"] for rank in said) == (is_too_much and bool(said)), case
        if case != "few rows" and said:  # rows that are not sent open nothing
            assert [max(values) for values in zip(*(rank["needs"] for rank in said), strict=True)] == needed


def test_places_of_rows_do_not_depend_on_what_a_gpu_leaves_unwritten_in_its_lists():
    """Three tokens; two go to the first rank, one to the second; room for three at each."""
    exact = plan(torch.tensor([[1, 0], [1, 1], [0, 0]]).bool())
    unwritten = torch.tensor([2**62, -(2**62), 7])
    lists = [torch.cat((values, unwritten)) for values in (exact.token_N, exact.pair_N, exact.row_N)]
    pair_M, is_row_M, slot_N = _slots(DispatchPlan(*lists, exact.expert_offsets, exact.token_offsets), 2, 3)
    assert is_row_M.tolist() == [True, True, False, True, False, False]
    assert pair_M.tolist() == [0, 2, 0, 3, 0, 0], "token * ranks + rank"
    assert slot_N.tolist()[:3] == [0, 1, 3], "token by token"
    assert all(0 <= slot < 6 for slot in slot_N.tolist())


@pytest.mark.parametrize("routing", [*OPEN, "a rank without tokens"])
def test_tokens_that_go_in_parts_give_the_same_output_and_gradients(results: dict[str, Any], routing: str):
    for rank in results["in_parts"]:
        wrong = {name: value for name, value in rank[routing].items() if not value < TOLERANCE}
        assert not wrong


@pytest.mark.parametrize("batch", ["dense start", "unlucky"])
def test_rows_in_memory_are_at_most_those_of_the_budget_there_and_back_however_many_layers(
    results: dict[str, Any], batch: str
):
    whole = max(rank[f"{batch}, inf"] for rank in results["peak_rows"])
    assert whole > 2 * 4, "two ranks' tokens in each of four layers"
    for rank in results["peak_rows"]:
        for budget in (1.0, 0.25):
            assert 0 < rank[f"{batch}, {budget}"] <= 2 * budget


def test_a_rank_without_any_token_still_works_for_the_other(results: dict[str, Any]):
    for rank in results["uneven"]:
        assert all(value < TOLERANCE for value in rank.values())


def test_a_token_goes_to_a_rank_once_though_two_experts_there_want_it(results: dict[str, Any]):
    three_tokens_to_two_ranks_and_back = [6, 6]
    for rank in results["rows_sent"]:
        assert rank["rows"] == three_tokens_to_two_ranks_and_back * 2  # the layer ran twice
