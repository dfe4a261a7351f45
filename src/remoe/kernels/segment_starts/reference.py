"""The meaning of remoe::segment_starts in plain PyTorch; also what runs on every device."""

from torch import Tensor


def segment_starts(is_start_T: Tensor) -> Tensor:
    """See the op's docstring."""
    return is_start_T.nonzero().flatten()
