"""combine_rows by the Triton kernel of the experts' own sums."""

import triton
from torch import Tensor

from remoe.kernels.expert_mlp.rows_kernels import combine_blocks, combine_kernel


def combine_rows_triton(rows_NH: Tensor, row_N: Tensor, token_offsets: Tensor) -> Tensor:
    """The sum of each token's rows [T, H], in fp32 and in their order."""
    num_tokens, (num_rows, hidden_size) = len(token_offsets) - 1, rows_NH.shape
    out_TH = rows_NH.new_empty((num_tokens, hidden_size))
    if num_tokens == 0 or num_rows == 0:
        return out_TH.zero_()
    blocks = combine_blocks(num_rows, num_tokens, hidden_size)
    combine_kernel[(num_tokens, triton.cdiv(hidden_size, blocks["BLOCK_H"]))](
        rows_NH, row_N, token_offsets, rows_NH, row_N, None, out_TH, hidden_size, 0, num_rows,
        WEIGHTED=False, ADD=False, **blocks,
    )  # fmt: skip
    return out_TH
