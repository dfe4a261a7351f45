"""Facts about the op that finds where segments begin."""

import pytest
import torch

from remoe.kernels.segment_starts import segment_starts


@pytest.mark.parametrize("flags", [[True, False, True, True], [False, False], []])
def test_it_lists_the_true_places(flags):
    is_start_T = torch.tensor(flags, dtype=torch.bool)
    assert segment_starts(is_start_T).tolist() == [place for place, flag in enumerate(flags) if flag]
    torch.library.opcheck(torch.ops.remoe.segment_starts.default, (is_start_T,))
