"""remoe::segment_starts: where the runs of tokens that share one merged expert begin."""

# pyright: reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
# (torch.library has no precise types)

from typing import cast

import torch
from torch import Tensor

from remoe.kernels.segment_starts import reference


@torch.library.custom_op("remoe::segment_starts", mutates_args=())
def segment_starts(is_start_T: Tensor) -> Tensor:
    """The places of the true tokens in ascending order, int64 [J]; no gradient. On a GPU it waits for their number."""
    return reference.segment_starts(is_start_T)


@segment_starts.register_fake
def _(is_start_T: Tensor) -> Tensor:
    num_segments = cast(int, torch.library.get_ctx().new_dynamic_size())
    return is_start_T.new_empty((num_segments,), dtype=torch.int64)
