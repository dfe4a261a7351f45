"""combine_rows by the Triton kernel of the experts' own sums."""

import triton
from torch import Tensor

from remoe.kernels.expert_mlp.rows_kernels import combine_kernel


def combine_rows_triton(rows_NH: Tensor, row_N: Tensor, token_offsets: Tensor) -> Tensor:
    """The sum of each token's rows [T, H], in fp32 and in their order."""
    num_tokens, (num_rows, hidden_size) = len(token_offsets) - 1, rows_NH.shape
    out_TH = rows_NH.new_empty((num_tokens, hidden_size))
    if num_tokens == 0 or num_rows == 0:
        return out_TH.zero_()
    block_h = min(1024, triton.next_power_of_2(hidden_size))
    block_s = max(1, min(8, triton.next_power_of_2(num_rows // num_tokens)))
    combine_kernel[(num_tokens, triton.cdiv(hidden_size, block_h))](
        rows_NH, row_N, token_offsets, rows_NH, row_N, out_TH, hidden_size, 0, num_rows,
        BLOCK_S=block_s, BLOCK_H=block_h, WEIGHTED=False, ADD=False,
    )  # fmt: skip
    return out_TH
