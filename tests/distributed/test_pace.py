"""A process that holds the others up shows in the metrics (cases_pace.py)."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.xdist_group("distributed")


@pytest.mark.parametrize(("case", "slow"), [("slow_experts", 1), ("slow_shared_experts", 0), ("slow_batches", 1)])
def test_the_slow_one_of_two_processes_is_named_at_every_step(results_of: Callable[..., Any], case: str, slow: int):
    everyone = results_of(2, "slow_experts", "slow_shared_experts", "slow_batches")[case]
    assert everyone[0] == everyone[1]
    assert [rank for rank, _ in everyone[0]] == [slow] * 4
    assert all(ratio > 1.5 for _, ratio in everyone[0])
