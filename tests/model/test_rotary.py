"""Facts about the rotary embedding."""

import torch

from remoe.kernels.rotary_angles import rotary_angles
from remoe.model.rotary import rotate

THETA = 1_000_000.0


def heads(seed: int, head_size: int = 8) -> torch.Tensor:
    return torch.randn(1, 1, 1, head_size, generator=torch.Generator().manual_seed(seed))


def score(query_position: int, key_position: int) -> torch.Tensor:
    query = rotate(heads(0), *rotary_angles(torch.tensor([[query_position]]), 8, THETA))
    key = rotate(heads(1), *rotary_angles(torch.tensor([[key_position]]), 8, THETA))
    return (query * key).sum()


def test_a_score_depends_on_the_distance_of_two_positions_only():
    for shift in (1, 40, 900):
        torch.testing.assert_close(score(7, 3), score(7 + shift, 3 + shift), rtol=0, atol=1e-4)
    assert abs(score(7, 3) - score(8, 3)) > 1e-2


def test_position_zero_turns_nothing_and_lengths_stay():
    turned = rotate(heads(0), *rotary_angles(torch.tensor([[0]]), 8, THETA))
    assert torch.equal(turned, heads(0))
    far = rotate(heads(0), *rotary_angles(torch.tensor([[12_345]]), 8, THETA))
    torch.testing.assert_close(far.norm(), heads(0).norm(), rtol=1e-6, atol=0)


def test_pairs_are_halves_apart_and_turn_by_theta_to_the_minus_2i_over_d():
    cos, sin = rotary_angles(torch.tensor([[3]]), 4, 100.0)
    torch.testing.assert_close(cos[0, 0, 0], torch.tensor([3.0, 0.3]).cos(), rtol=1e-6, atol=0)
    unit = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    expected = torch.tensor([cos[0, 0, 0, 0], 0.0, sin[0, 0, 0, 0], 0.0])
    torch.testing.assert_close(rotate(unit, cos, sin).flatten(), expected, rtol=0, atol=0)


def test_angles_are_fp32_and_heads_keep_their_dtype():
    cos, sin = rotary_angles(torch.tensor([[1000, 1001]]), 8, 10_000.0)
    assert cos.dtype == sin.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = rotary_angles(torch.tensor([[1000, 1001]]), 8, 10_000.0)
    assert torch.equal(inside, cos)
    assert rotate(heads(0).bfloat16(), cos[:, :, :1], sin[:, :, :1]).dtype == torch.bfloat16


def test_opcheck_accepts_the_op():
    torch.library.opcheck(torch.ops.remoe.rotary_angles.default, (torch.tensor([[0, 3, 7]]), 8, THETA))


def test_a_tokens_heads_stay_side_by_side_in_memory():
    projected_BSX = torch.zeros(2, 3, 4 * 8)
    cos, sin = rotary_angles(torch.arange(3)[None], 8, THETA)
    turned_BASD = rotate(projected_BSX.unflatten(-1, (-1, 8)).transpose(1, 2), cos, sin)
    assert turned_BASD.shape == (2, 4, 3, 8)
    assert turned_BASD.transpose(1, 2).is_contiguous()
