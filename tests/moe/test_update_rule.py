"""The smoother controllers: what each does to the coefficient that the paper's rule does not."""

import itertools
import math

import pytest
import torch

from remoe import ConfigError, SparsityController

TOTAL = 8_000_000
STEP = math.log(1.2)


def moves(controller, sparsities):
    """The moves of the log-coefficient, in units of log multiplier."""
    logs = [controller.log_coef.item()]
    for sparsity in sparsities:
        controller.update(active=round((1 - sparsity) * TOTAL), total=TOTAL)
        logs.append(controller.log_coef.item())
    return [(after - before) / STEP for before, after in itertools.pairwise(logs)]


def simulated(controller, steps=400, noise=0.004, gain=0.02):
    """Follow a router whose sparsity rises with the log-coefficient, plus noise: the coefficients, the sparsities."""
    draw = torch.Generator().manual_seed(0)
    sparsity, coefs, sparsities = 0.5, [], []
    for _ in range(steps):
        wanted = 0.875 + gain * (controller.log_coef.item() - math.log(1e-3))
        sparsity += 0.3 * (min(max(wanted, 0.0), 1.0) - sparsity)
        measured = min(max(sparsity + noise * torch.randn((), generator=draw).item(), 0.0), 1.0)
        controller.update(active=round((1 - measured) * TOTAL), total=TOTAL)
        coefs.append(controller.log_coef.item())
        sparsities.append(sparsity)
    return coefs, sparsities


def travelled(coefs):
    """How far the log-coefficient moved in all, late in a simulation, in steps."""
    late = coefs[len(coefs) // 2 :]
    return sum(abs(b - a) for a, b in itertools.pairwise(late)) / STEP / (len(late) - 1)


def test_proportional_steps_shrink_towards_the_target_and_are_whole_far_from_it():
    controller = SparsityController(1, 8, rule="proportional")
    expected = [1, 1, 0.5, 0.1, 0, -0.25, -1]
    assert moves(controller, [0.5, 0.855, 0.865, 0.873, 0.875, 0.88, 0.9]) == pytest.approx(expected, abs=1e-9)


def test_the_width_of_proportional_steps_is_a_setting():
    controller = SparsityController(1, 8, rule="proportional", full_step_at=0.1)
    assert moves(controller, [0.775, 0.865]) == pytest.approx([1, 0.1], abs=1e-9)


def test_dead_band_holds_the_coefficient_near_the_target_and_nowhere_else():
    controller = SparsityController(1, 8, dead_band=0.002)
    expected = [1, 0, 0, 0, -1]
    assert moves(controller, [0.872, 0.8735, 0.875, 0.8765, 0.878]) == pytest.approx(expected, abs=1e-9)


def test_moving_average_ignores_one_outlier_and_follows_a_lasting_change():
    sparsities = [0.87] * 20 + [0.9] + [0.87] * 5 + [0.9] * 30
    plain, averaged = (moves(SparsityController(1, 8, average=past), sparsities) for past in (0.0, 0.9))
    assert plain[20] == pytest.approx(-1)
    assert averaged[:20] == pytest.approx([1] * 20)
    assert averaged[20] == pytest.approx(1)
    assert averaged[-1] == pytest.approx(-1)


def test_moving_average_starts_with_the_first_step_alone():
    controller = SparsityController(1, 8, average=0.9, rule="proportional")
    assert moves(controller, [0.865, 0.875]) == pytest.approx([0.5, 0.5 * 0.09 / 0.19], abs=1e-9)


def test_sign_rule_toggles_for_ever_where_the_smoother_ones_come_to_rest():
    sign, _ = simulated(SparsityController(1, 8), noise=0.0)
    assert travelled(sign) == pytest.approx(1)
    for options in ({"dead_band": 0.002}, {"rule": "proportional"}):
        coefs, sparsities = simulated(SparsityController(1, 8, **options), noise=0.0)
        assert travelled(coefs) < 0.01, options
        assert sparsities[-1] == pytest.approx(0.875, abs=0.0021)


@pytest.mark.parametrize(
    "options",
    [{"rule": "proportional"}, {"dead_band": 0.004, "average": 0.8}, {"rule": "proportional", "average": 0.8}],
    ids=str,
)
def test_smoother_rules_reach_the_target_under_noise_and_move_less(options):
    sign, _ = simulated(SparsityController(1, 8))
    coefs, sparsities = simulated(SparsityController(1, 8, **options))
    late = sparsities[200:]
    assert sum(late) / len(late) == pytest.approx(0.875, abs=0.003)
    assert travelled(coefs) < 0.7 * travelled(sign)


def test_defaults_are_the_papers_rule_bit_for_bit():
    plain = SparsityController(1, 8)
    spelled = SparsityController(1, 8, rule="sign", dead_band=0.0, average=0.0)
    assert moves(plain, [0.5, 0.9, 0.875, 0.874999]) == moves(spelled, [0.5, 0.9, 0.875, 0.874999])
    assert set(plain.state_dict()) == {"log_coef"}


def test_skipped_and_empty_steps_leave_the_average_alone():
    controller = SparsityController(1, 8, average=0.9, num_layers=2)
    controller.update(torch.tensor([800, 0]), torch.tensor([800, 0]))
    before = {name: value.clone() for name, value in controller.state_dict().items()}
    controller.update(torch.tensor([0, 800]), torch.tensor([800, 800]), skipped=torch.tensor(True))
    assert all(torch.equal(value, before[name]) for name, value in controller.state_dict().items())
    assert controller.distance_weight.tolist() == pytest.approx([0.1, 0])
    assert controller.coef.tolist() == pytest.approx([1.2e-8, 1e-8])


def test_saved_average_goes_on_bit_for_bit():
    first, second = (SparsityController(1, 8, average=0.9, rule="proportional") for _ in range(2))
    moves(first, [0.5, 0.86, 0.88])
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    assert moves(first, [0.87, 0.9]) == moves(second, [0.87, 0.9])
    with pytest.raises(ConfigError, match=r"keep sparsity\.average as it was"):
        SparsityController(1, 8).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "proportionl"}, "did you mean 'proportional'"),
        ({"dead_band": -0.1}, r"dead_band is -0\.1, must be between 0\.0 and 1\.0"),
        ({"average": 1.0}, r"average is 1\.0, must be at least 0 and below 1"),
        ({"full_step_at": 0.0}, r"full_step_at is 0\.0, must be above 0"),
        ({"released": True, "dead_band": 0.1}, "released is true"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SparsityController(1, 8, **options)
