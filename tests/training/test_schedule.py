"""Facts about the learning rate."""

import pytest

from remoe.training.config import OptimizerConfig
from remoe.training.schedule import learning_rate


def rates(schedule: str, steps: int = 100, **changes: float) -> list[float]:
    config = OptimizerConfig(schedule=schedule, lr=1.0, min_lr=0.1, **{"warmup_steps": 10} | changes)
    return [learning_rate(config, step, steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_is_linear_and_ends_at_the_peak(schedule: str):
    assert rates(schedule)[:10] == pytest.approx([0.1 * step for step in range(1, 11)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_last_step_has_min_lr(schedule: str):
    assert rates(schedule)[-1] == pytest.approx(0.1)


def test_cosine_is_half_way_down_in_the_middle():
    assert rates("cosine")[54] == pytest.approx(0.55)


def test_wsd_is_flat_and_then_falls_linearly_over_the_last_fifth():
    values = rates("wsd", decay_fraction=0.2)
    assert values[9:80] == pytest.approx([1.0] * 71)
    assert values[89] == pytest.approx(0.55)


def test_wsd_without_decay_stays_at_the_peak():
    assert rates("wsd", decay_fraction=0.0)[-1] == 1.0


def test_constant_stays_at_the_peak():
    assert rates("constant")[10:] == [1.0] * 90


def test_without_warm_up_the_first_step_already_follows_the_schedule():
    assert rates("linear", warmup_steps=0)[0] == pytest.approx(0.1 + 0.9 * 0.99)


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    assert rates("cosine", steps=5) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_paper_rate_at_step_110_of_its_warm_up():
    # ReMoE §3: lr <= 9.2e-5 at step 110
    config = OptimizerConfig(lr=5e-4, min_lr=5e-5, warmup_steps=600)
    assert learning_rate(config, 110, 60_000) == pytest.approx(9.17e-5, rel=1e-3)
