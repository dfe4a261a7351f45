"""The time that a process works for itself."""

import time
from unittest.mock import patch

import pytest
import torch

from remoe.model import ReMoEConfig, ReMoEForCausalLM
from remoe.moe.experts import GroupedExperts
from remoe.training.pace import Pace, slowest

PAUSE_SECONDS = 0.05


@pytest.fixture
def model() -> ReMoEForCausalLM:
    return ReMoEForCausalLM(
        ReMoEConfig(
            vocab_size=11,
            hidden_size=8,
            num_heads=2,
            num_layers=2,
            intermediate_size=8,
            num_experts=2,
            moe_layers=[1],
        )
    )


def slow_experts(*arguments, original=GroupedExperts.forward, **options):
    time.sleep(PAUSE_SECONDS)
    return original(*arguments, **options)


def test_the_slowest_process_is_compared_with_the_median_one():
    assert slowest([1.0, 1.0, 3.0, 1.5]) == {"slowest_rank": 2, "slowest_ratio": 3.0}
    assert slowest([2.0, 1.0]) == {"slowest_rank": 0, "slowest_ratio": 2.0}


@pytest.mark.parametrize("seconds", [None, [1.0], [1.0, float("nan")]])
def test_nothing_is_said_of_one_process_or_before_all_are_measured(seconds):
    assert slowest(seconds) == {}


def test_forward_passes_that_are_measured_count_and_others_do_not(model):
    pace, tokens_BS = Pace(model, torch.device("cpu")), torch.zeros(1, 4, dtype=torch.int64)
    assert pace.seconds != pace.seconds
    with patch.object(GroupedExperts, "forward", slow_experts):
        model(tokens_BS)
        with pace.measured():
            model(tokens_BS)
            model(tokens_BS)
        model(tokens_BS)
    assert 2 * PAUSE_SECONDS <= pace.seconds < 3 * PAUSE_SECONDS


def test_the_mean_wait_for_a_batch_counts(model):
    pace = Pace(model, torch.device("cpu"))

    def batches():
        yield 1
        time.sleep(2 * PAUSE_SECONDS)
        yield 2

    assert list(pace.waiting_for(batches())) == [1, 2]
    with pace.measured():
        model(torch.zeros(1, 4, dtype=torch.int64))
    assert pace.seconds >= PAUSE_SECONDS
    first = pace.seconds
    assert pace.seconds == first, "it stays until the next one is measured"
