"""Rows there and back: against plain gathers and sums, with gradients, no rows, and torch's own checks."""

import pytest
import torch

from remoe.kernels.rows import combine_rows, dispatch_rows, reference
from remoe.moe.dispatch import plan


def lists_of(num_tokens, num_experts, density):
    generator = torch.Generator().manual_seed(num_tokens)
    drawn = plan(torch.rand(num_tokens, num_experts, generator=generator) < density)
    return drawn.token_N, drawn.row_N, drawn.token_offsets


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 1), (17, 5)])
def test_both_ops_and_their_gradients_match_plain_gathers_and_sums(num_tokens, num_experts, density):
    lists = lists_of(num_tokens, num_experts, density)
    hidden = torch.randn(num_tokens, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(len(lists[0]), 3, dtype=torch.float64, requires_grad=True)
    pairs = [
        (dispatch_rows(hidden, *lists), reference.dispatch_rows(hidden, lists[0]), hidden),
        (combine_rows(rows, *lists), reference.combine_rows(rows, lists[0], num_tokens), rows),
    ]
    for actual, expected, source in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        direction = torch.randn_like(actual)
        gradients = [torch.autograd.grad((out * direction).sum(), source)[0] for out in (actual, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_torch_finds_nothing_wrong_with_the_ops():
    lists = lists_of(9, 4, 0.4)
    hidden = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(len(lists[0]), 3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(dispatch_rows, (hidden, *lists))
    torch.library.opcheck(combine_rows, (rows, *lists))
