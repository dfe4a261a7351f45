"""The row lists of a routing map: order, completeness, edges."""

import pytest
import torch

from remoe.moe.dispatch import plan


def random_map(tokens, experts, density, seed=0):
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < density


def test_rows_are_sorted_by_expert_then_token_on_a_worked_map():
    lists = plan(torch.tensor([[0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 0, 0], [1, 1, 0, 1]], dtype=torch.bool))
    assert lists.token_N.tolist() == [3, 1, 2, 3, 0, 1, 3]
    assert lists.pair_N.tolist() == [12, 5, 9, 13, 2, 6, 15]
    assert lists.row_N.tolist() == [4, 1, 5, 2, 0, 3, 6]
    assert lists.expert_offsets.tolist() == [0, 1, 4, 6, 7]
    assert lists.token_offsets.tolist() == [0, 1, 3, 4, 7]


@pytest.mark.parametrize(("tokens", "experts"), [(1, 1), (5, 3), (64, 17), (0, 4), (33, 1)])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_every_active_pair_is_listed_once_in_both_orders(tokens, experts, density):
    routing_map = random_map(tokens, experts, density)
    lists = plan(routing_map)
    rebuilt = torch.zeros(tokens * experts, dtype=torch.int64).index_add_(
        0, lists.pair_N, torch.ones_like(lists.pair_N)
    )
    assert torch.equal(rebuilt.view(tokens, experts), routing_map.long())
    assert torch.equal(lists.expert_offsets.diff(), routing_map.sum(0))
    assert torch.equal(lists.token_offsets.diff(), routing_map.sum(1))
    assert torch.equal(lists.pair_N[lists.row_N], lists.pair_N.sort().values)
    assert torch.equal(lists.token_N, lists.pair_N // experts)


def test_opcheck_accepts_the_op():
    torch.library.opcheck(torch.ops.remoe.dispatch_lists.default, (random_map(9, 4, 0.4),))
