"""The controller against the worked sequences of the ReMoE spec (TV3, TV4), its bounds and its ties."""

import math

import pytest
import torch

from remoe import ConfigError, SparsityController

TOTAL = 8_000_000
SPARSITIES = [0.5, 0.61, 0.8, 0.9, 0.875, 0.88, 0.86, 0.874999]


def follow(controller, sparsities):
    coefs = []
    for sparsity in sparsities:
        controller.update(active=round((1 - sparsity) * TOTAL), total=TOTAL)
        coefs.append(controller.coef.item())
    return coefs


def test_paper_rule_gives_the_worked_sequence():
    expected = [1.2e-8, 1.44e-8, 1.728e-8, 1.44e-8, 1.44e-8, 1.2e-8, 1.44e-8, 1.728e-8]
    assert follow(SparsityController(1, 8), SPARSITIES) == pytest.approx(expected, rel=1e-6)


def test_released_rule_lowers_at_a_tie():
    expected = [1.2e-8, 1.44e-8, 1.728e-8, 1.44e-8, 1.2e-8, 1.0e-8, 1.2e-8, 1.44e-8]
    assert follow(SparsityController(1, 8, released=True), SPARSITIES) == pytest.approx(expected, rel=1e-6)


def test_hundred_raises_give_the_worked_coefficient():
    controller = SparsityController(1, 8)
    follow(controller, [0.0] * 100)
    assert controller.log_coef.exp().item() == pytest.approx(0.8281797452201425, rel=1e-12)


@pytest.mark.parametrize(("sparsity", "expected"), [(0.3, 1.2e-8), (0.5, 1e-8), (0.7, 8.333333333333334e-9)])
def test_two_of_four_experts_steer_to_half(sparsity, expected):
    # RMoE §9.8
    controller = SparsityController(2, 4)
    follow(controller, [sparsity])
    assert controller.log_coef.exp().item() == pytest.approx(expected, rel=1e-12)


def test_the_logarithm_moves_by_the_worked_step_and_exceeds_1e4_at_the_152nd_raise():
    controller = SparsityController(1, 8, max_coef=1e6)
    assert controller.log_coef.item() == pytest.approx(-18.420680743952367, abs=1e-12)
    follow(controller, [0.0])
    assert controller.log_coef.item() == pytest.approx(-18.420680743952367 + 0.182321556793955, abs=1e-12)
    follow(controller, [0.0] * 150)
    assert controller.coef.item() < 1e4
    assert follow(controller, [0.0])[0] > 1e4


@pytest.mark.parametrize("drops", [378, 460, 588])
def test_drops_that_end_in_subnormal_numbers_in_the_released_code_stop_at_the_bound_and_turn_at_once(drops):
    controller = SparsityController(1, 8)
    assert follow(controller, [1.0] * drops)[-1] == pytest.approx(1e-16, rel=1e-6)
    assert follow(controller, [0.0])[-1] == pytest.approx(1.2e-16, rel=1e-6)


def test_588_raises_that_overflow_in_the_released_code_stop_at_the_bound():
    assert follow(SparsityController(1, 8), [0.0] * 588)[-1] == pytest.approx(1e4, rel=1e-6)


def test_a_coefficient_at_a_bound_leaves_it_at_once():
    controller = SparsityController(1, 8, init=50.0, max_coef=1e2)
    expected = [60, 72, 86.4, 100, 100, 100, 83.3333333333, 69.4444444444]
    assert follow(controller, [0.0] * 6 + [1.0] * 2) == pytest.approx(expected, rel=1e-6)
    controller = SparsityController(1, 8, init=2e-16)
    expected = [1.66666666667e-16, 1.38888888889e-16, 1.15740740741e-16, 1e-16, 1e-16, 1.2e-16, 1.44e-16]
    assert follow(controller, [1.0] * 5 + [0.0] * 2) == pytest.approx(expected, rel=1e-6)


def test_a_thousand_raises_stay_finite_and_come_back():
    controller = SparsityController(1, 8)
    assert follow(controller, [0.0] * 1000)[-1] == pytest.approx(1e4, rel=1e-6)
    assert math.isfinite(follow(controller, [1.0])[-1])


def test_skipped_steps_and_empty_steps_leave_the_coefficient_alone():
    controller = SparsityController(1, 8)
    controller.update(active=TOTAL, total=TOTAL, skipped=True)
    controller.update(active=TOTAL, total=TOTAL, skipped=torch.tensor(True))
    controller.update(active=0, total=0)
    assert controller.log_coef.item() == math.log(1e-8)
    released = SparsityController(1, 8, released=True)
    released.update(active=0, total=0)
    released.update(active=0, total=TOTAL, skipped=True)
    assert released.log_coef.item() == math.log(1e-8)


def test_counts_past_float_precision_are_compared_exactly():
    controller = SparsityController(1, 8)
    total = 2**53 + 8
    controller.update(active=torch.tensor(total // 8), total=torch.tensor(total))
    assert controller.log_coef.item() == math.log(1e-8)
    controller.update(active=torch.tensor(total // 8 + 1), total=torch.tensor(total))
    assert controller.coef.item() == pytest.approx(1.2e-8, rel=1e-6)


def test_one_coefficient_a_layer_moves_each_by_itself():
    controller = SparsityController(1, 8, num_layers=3)
    controller.update(active=torch.tensor([800, 100, 0]), total=torch.tensor([800, 800, 800]))
    assert controller.coef.tolist() == pytest.approx([1.2e-8, 1e-8, 1e-8 / 1.2], rel=1e-6)


def test_with_all_experts_wanted_the_coefficient_never_rises():
    controller = SparsityController(8, 8)
    assert controller.target_sparsity == 0
    assert follow(controller, [0.0, 0.5]) == pytest.approx([1e-8, 1e-8 / 1.2], rel=1e-6)


def test_saved_state_goes_on_bit_for_bit():
    first, second = SparsityController(1, 8), SparsityController(1, 8)
    follow(first, SPARSITIES)
    second.load_state_dict(first.state_dict())
    assert follow(first, SPARSITIES) == follow(second, SPARSITIES)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"multiplier is 1\.0, must be above 1"):
        SparsityController(1, 8, multiplier=1.0)
    with pytest.raises(ConfigError, match=r"init is 0\.0"):
        SparsityController(1, 8, init=0.0)
    with pytest.raises(ConfigError, match="top_k is 9"):
        SparsityController(9, 8)
    with pytest.raises(ConfigError, match="per_layer"):
        SparsityController(1, 8).load_state_dict(SparsityController(1, 8, num_layers=2).state_dict())
