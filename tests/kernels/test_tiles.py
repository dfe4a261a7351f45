"""Which tiles a layer gets."""

import pytest
import torch

from remoe.kernels.expert_mlp import tuning
from remoe.kernels.expert_mlp.tiles import GROUPED_MM, Sizes, Tiles, choose, words_of

MEASURED = Sizes(hidden_size=1024, expert_size=4096, num_experts=128, rows_per_expert=128.0)


def test_tiles_are_written_as_they_are_read():
    assert str(Tiles.parsed("128x256x64 w8 s3 g16")) == "128x256x64 w8 s3 g16"


def test_a_shape_between_measured_ones_gets_the_nearest_row():
    near = MEASURED._replace(hidden_size=1000, rows_per_expert=120.0)
    assert words_of(near, torch.bfloat16) == words_of(MEASURED, torch.bfloat16)
    assert GROUPED_MM in words_of(MEASURED, torch.bfloat16).values()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_only_bf16_uses_the_grouped_product_of_torch(dtype):
    assert GROUPED_MM not in words_of(MEASURED, dtype).values()


def test_a_forced_choice_holds_inside_only():
    before = choose(MEASURED, torch.bfloat16)
    with tuning.forced("grad_x", GROUPED_MM):
        assert choose(MEASURED, torch.bfloat16).grad_x is None
    assert choose(MEASURED, torch.bfloat16) == before
