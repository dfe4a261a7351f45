"""Student's t against published quantiles."""

import pytest

from remoe.recipes.intervals import interval, t_probability, t_quantile


def test_a_run_that_diverged_leaves_no_interval():
    found = interval([1.0, float("nan"), 2.0])
    assert (found.low, found.high) == (None, None)


@pytest.mark.parametrize(
    ("degrees", "confidence", "expected"),
    [
        (1, 0.95, 12.7062047),
        (2, 0.95, 4.3026527),
        (3, 0.95, 3.1824463),
        (4, 0.95, 2.7764451),
        (5, 0.95, 2.5705818),
        (10, 0.95, 2.2281389),
        (29, 0.95, 2.0452296),
        (4, 0.99, 4.6040949),
        (7, 0.90, 1.8945786),
    ],
)
def test_quantile_of_students_t_is_the_published_one(degrees, confidence, expected):
    assert t_quantile(degrees, confidence) == pytest.approx(expected, abs=1e-6)


def test_t_nears_the_normal_distribution_with_many_degrees():
    assert t_quantile(100_000, 0.95) == pytest.approx(1.95996, abs=1e-4)


def test_probability_grows_from_zero_to_one():
    probabilities = [t_probability(t, 3) for t in (0.0, 0.5, 1.0, 5.0, 1e6)]
    assert probabilities == sorted(probabilities)
    assert (probabilities[0], probabilities[-1]) == (0.0, pytest.approx(1.0, abs=1e-9))


def test_interval_of_three_values():
    mean, low, high = interval([0.01, 0.02, 0.03])
    half = 4.3026527 * 0.01 / 3**0.5
    assert (mean, low, high) == pytest.approx((0.02, 0.02 - half, 0.02 + half), abs=1e-8)


def test_equal_values_have_an_interval_without_width():
    assert interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_one_value_has_no_interval():
    assert interval([0.5]) == (0.5, None, None)
