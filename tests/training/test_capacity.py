"""Facts about the choice of row capacities."""

import pytest
import torch

from remoe.moe import MoE, MoEConfig, experts
from remoe.training.capacity import WINDOW, RowCapacity, enough_for, layers_in_chunks, rounded_up, row_capacities

MOST = 100_000


def seeing(*counts: list[int], most: int = MOST) -> RowCapacity:
    capacity = RowCapacity(most)
    for active_L in counts:
        capacity.see(active_L)
    return capacity


def test_steps_are_exact_until_a_window_of_steady_counts_is_full():
    steady = [[1000, 2000]] * WINDOW
    assert seeing(*steady[:-1]).capacities is None
    assert seeing(*steady).capacities == (1000, 2000)


def test_counts_that_fall_are_exact_and_get_a_capacity_once_they_stay():
    falling = [[int(50_000 * 0.9**step)] for step in range(30)]
    assert seeing(*falling).capacities is None
    assert seeing(*falling, *[[2000]] * WINDOW).capacities == (2000,)


def test_a_count_that_varies_gets_its_most_its_spread_and_a_sixteenth_rounded_up():
    counts = [1000 + 10 * (step % 16) for step in range(WINDOW)]  # 1000 to 1150
    assert enough_for(counts) == rounded_up(1150 + 150 + 71) == 1408
    assert enough_for([1000, 1001]) == rounded_up(1001 + 63 + 62)  # a narrow spread is taken as 1/16


@pytest.mark.parametrize(("rows", "rounded"), [(0, 0), (7, 7), (15, 15), (17, 18), (1000, 1024), (19661, 20480)])
def test_rounding_leaves_four_bits(rows, rounded):
    assert rounded_up(rows) == rounded


def test_small_changes_leave_the_capacities_alone():
    capacity = seeing(*[[1000 + step % 50, 2000] for step in range(WINDOW)])
    first = capacity.capacities
    for step in range(200):
        capacity.see([1000 + step % 60, 2000])
    assert capacity.capacities is first


def test_capacities_rise_before_counts_reach_them_and_fall_when_much_is_wasted():
    capacity = seeing(*[[1000 + step % 50] for step in range(WINDOW)])
    (first,) = capacity.capacities
    for step in range(400):
        capacity.see([1000 + step])
        assert capacity.capacities is None or 1000 + step <= capacity.capacities[0]
    assert capacity.capacities[0] > first
    for _ in range(2 * WINDOW):
        capacity.see([700])
    assert capacity.capacities == (700,)


def test_an_outlier_makes_steps_exact_until_it_is_past():
    capacity = seeing(*[[1000]] * WINDOW, [3000])
    assert capacity.capacities is None
    for _ in range(WINDOW):
        capacity.see([1000])
    assert capacity.capacities == (1000,)


def test_no_capacity_is_above_all_pairs():
    assert seeing(*[[60 + step % 2] for step in range(WINDOW)], most=64).capacities == (64,)


def test_layers_have_their_capacities_only_inside():
    layers = [MoE(MoEConfig(hidden_size=8, intermediate_size=8, num_experts=4)) for _ in range(2)]
    hidden_BSH = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    with row_capacities(layers, (24, 0), num_tokens=6):
        overflows = [layer(hidden_BSH)[1].overflow for layer in layers]
    assert [bool(overflow) for overflow in overflows] == [False, True]
    assert [layer.row_capacity for layer in layers] == [None, None]
    assert layers[0](hidden_BSH)[1].overflow is None


@pytest.mark.parametrize(
    ("rows", "in_chunks"),
    [
        ([100, 100], []),
        ([150, 50], []),  # one above the cap, together at it
        ([160, 100, 50], [0]),
        ([301, 0, 0, 0], [0]),  # more than three shares
        ([300, 30, 30, 30], []),
        ([250, 250, 10, 10], [0]),  # the first of equals
        ([290, 110, 10], [0]),  # the other would not be enough
        ([250, 190, 10, 10], [1]),  # the smallest that is enough
        ([180, 180, 180, 0], [0, 1]),  # none is enough alone
        ([400, 400, 400], [0, 1, 2]),
        ([], []),
    ],
)
def test_a_layer_keeps_more_than_its_share_where_others_keep_less(rows, in_chunks):
    assert [layer for layer, chunked in enumerate(layers_in_chunks(rows, cap=100)) if chunked] == in_chunks


def test_only_layers_that_must_work_in_chunks_are_told_a_cap(monkeypatch):
    caps = []
    monkeypatch.setattr(experts, "_ROWS_OF_NO_CONCERN", 0)
    monkeypatch.setattr(experts, "expert_mlp", lambda hidden_TH, *others: (caps.append(others[8]) or hidden_TH, None))
    config = MoEConfig(hidden_size=8, intermediate_size=8, num_experts=4)  # k = 1: a cap of 12 rows for 8 tokens
    layers = [MoE(config) for _ in range(3)]
    hidden_BSH = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))

    def caps_with(capacities: tuple[int, ...] | None) -> list[int]:
        caps.clear()
        with row_capacities(layers, capacities, num_tokens=8):
            for layer in layers:
                layer(hidden_BSH)
        return caps.copy()

    assert caps_with((20, 8, 8)) == [0, 0, 0]
    assert caps_with((20, 16, 4)) == [0, 12, 0]
    assert caps_with(None) == [12, 12, 12]
