"""Which layers to thin out: the cheapest mix of measured cuts."""

import itertools

import pytest

from remoe.eval.cut_costs import Cut, cheapest_density


def test_experts_are_taken_where_they_cost_least():
    cuts_L = [[Cut(1.0, 0.5), Cut(2.0, 2.0)], [Cut(0.5, 0.1), Cut(1.0, 0.9)]]
    # prices: layer 0 0.5 then 1.5, layer 1 0.2 then 1.6 nats an expert
    assert cheapest_density([2.0, 1.0], cuts_L, 1.25, most=8) == [2.0, 0.5]
    assert cheapest_density([2.0, 1.0], cuts_L, 0.75, most=8) == [1.0, 0.5]
    assert cheapest_density([2.0, 1.0], cuts_L, 0.5, most=8) == [0.5, 0.5]
    assert cheapest_density([2.0, 1.0], cuts_L, 0.0, most=8) == [0.0, 0.0]


def test_a_cut_that_costs_more_than_a_deeper_one_is_passed_over():
    cuts = [Cut(0.5, 5.0), Cut(1.0, 1.0)]
    assert cheapest_density([1.0, 1.0], [cuts, [Cut(1.0, 1.2)]], 0.75, most=4) == [0.5, 1.0]


def test_the_mix_is_no_dearer_than_any_other_of_the_measured_ones():
    costs = [[0.0, 0.1, 0.4, 1.0], [0.0, 0.05, 0.1, 0.9], [0.0, 0.3, 0.7, 1.2]]
    cuts_L = [[Cut(float(n), cost) for n, cost in enumerate(row) if n] for row in costs]
    for missing in range(10):
        active_L = cheapest_density([3.0] * 3, cuts_L, 3 - missing / 3, most=8)
        price = sum(costs[layer][round(3 - active)] for layer, active in enumerate(active_L))
        mixes = (mix for mix in itertools.product(range(4), repeat=3) if sum(mix) == missing)
        assert price == pytest.approx(min(sum(costs[i][n] for i, n in enumerate(mix)) for mix in mixes))


def test_more_experts_than_trained_open_the_same_share_of_the_closed_ones():
    assert cheapest_density([1.0, 3.0], [], 3.5, most=5) == [3.0, 4.0]
    assert cheapest_density([1.0, 3.0], [], 5.0, most=5) == [5.0, 5.0]
    assert cheapest_density([1.0, 3.0], [], 2.0, most=5) == [1.0, 3.0]
