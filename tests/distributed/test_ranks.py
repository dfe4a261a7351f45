"""What a trainer asks of two processes (cases_ranks.py), and of one that is alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from remoe.distributed.ranks import Ranks

pytestmark = pytest.mark.xdist_group("distributed")
CASES = (
    *("sums", "agreement", "shares", "in_turn", "seeds", "rows", "first_alone"),
    *("exchange", "with_capacity", "reported", "in_parts", "uneven", "rows_sent", "peak_rows"),
)
"""Everything that runs on two processes without a model, in one start."""


@pytest.fixture
def results(results_of: Callable[..., Any]) -> dict[str, Any]:
    return results_of(2, *CASES)


def test_counts_are_summed_as_integers(results: dict[str, Any]):
    assert results["sums"] == [{"big": 2**54 + 1, "half": 1.0, "vector": [0, 3, 6]}] * 2


def test_all_ranks_know_the_labels_of_the_batch_and_a_signal_that_one_got(results: dict[str, Any]):
    assert results["agreement"] == [[21, 15]] * 2


def test_all_ranks_evaluate_equally_many_batches_and_count_each_once(results: dict[str, Any]):
    assert results["shares"] == [[["first", True], ["third", True]], [["second", True], ["third", False]]]


def test_the_other_ranks_find_what_the_first_left_on_disk(results: dict[str, Any]):
    assert results["in_turn"] == [[False, [0, 1]], [True, [0, 1]]]


def test_what_a_rank_draws_is_a_function_of_step_and_rank(results: dict[str, Any]):
    (first, again, following), (other, *_) = results["seeds"]
    assert first == again
    assert len({first, following, other}) == 3


def test_a_micro_batch_of_all_ranks_is_a_run_of_neighbouring_rows(results: dict[str, Any]):
    assert results["rows"] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_the_first_rank_acts_for_all_and_its_mistake_is_raised_on_all(results: dict[str, Any]):
    assert results["first_alone"] == [["result", "key is wrong", [0]], ["result", "key is wrong", []]]


def test_one_process_alone_changes_nothing():
    alone = Ranks()
    assert (alone.size, alone.is_first) == (1, True)
    assert alone.rows(4, 2) == [slice(0, 2), slice(2, 4)]
    assert (alone.total_number(7), alone.largest_number(7)) == (7, 7)
    assert list(alone.share_out(["batch"])) == [("batch", True)]
    count = torch.tensor(3)
    assert alone.total({"count": count})["count"] is count
    assert alone.on_first(lambda: "result") == "result"
