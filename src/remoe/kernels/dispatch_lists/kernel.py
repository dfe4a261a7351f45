"""The lists in three small kernels: count, scan, write. No sort, no atomics; only the length is waited for."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 8192  # map entries of one program
_SCAN_EXPERTS = 32


def dispatch_lists_triton(
    routing_map_TE: Tensor, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See remoe::dispatch_lists."""
    num_tokens, num_experts = routing_map_TE.shape
    block_e = triton.next_power_of_2(num_experts)
    block_t = min(256, max(4, _TILE // block_e))
    num_blocks = triton.cdiv(num_tokens, block_t)
    map_TE = routing_map_TE.contiguous().view(torch.uint8)

    def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=map_TE.device)

    if num_tokens == 0:
        rows = new(capacity or 0)
        return rows, rows.clone(), rows.clone(), new(num_experts + 1).zero_(), new(1).zero_(), new().zero_()
    before_BE, of_block_B, of_expert_E = (
        new(num_blocks, num_experts, dtype=torch.int32),
        new(num_blocks, dtype=torch.int32),
        new(num_experts),
    )
    sizes = (num_tokens, num_experts)
    blocks = {"BLOCK_T": block_t, "BLOCK_E": block_e}
    _count_kernel[(num_blocks,)](map_TE, before_BE, of_block_B, *sizes, **blocks, num_warps=8)
    _scan_kernel[(triton.cdiv(num_experts, _SCAN_EXPERTS),)](
        before_BE, of_expert_E, num_blocks, num_experts, BLOCK_B=64, BLOCK_E=_SCAN_EXPERTS
    )
    length = int(of_expert_E.sum()) if capacity is None else capacity
    token_N, pair_N, row_N = new(length), new(length), new(length)
    expert_offsets, token_offsets, num_pairs = new(num_experts + 1), new(num_tokens + 1), new()
    _write_kernel[(num_blocks,)](
        map_TE, before_BE, of_block_B, of_expert_E, token_N, pair_N, row_N, expert_offsets, token_offsets,
        num_pairs, *sizes, num_blocks, length, **blocks, BLOCK_B=128, num_warps=8,
    )  # fmt: skip
    return token_N, pair_N, row_N, expert_offsets, token_offsets, num_pairs


@triton.jit
def _load_map(map_ptr, t0, num_tokens, num_experts, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    token = t0 + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    inside = (token[:, None] < num_tokens) & (expert[None, :] < num_experts)
    at = token[:, None].to(tl.int64) * num_experts + expert[None, :]
    return tl.load(map_ptr + at, mask=inside, other=0).to(tl.int32), at  # [BLOCK_T, BLOCK_E]


@triton.jit
def _count_kernel(
    map_ptr, counts_ptr, totals_ptr, num_tokens, num_experts, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):
    block = tl.program_id(0)
    is_on, _ = _load_map(map_ptr, block * BLOCK_T, num_tokens, num_experts, BLOCK_T, BLOCK_E)
    count_E = tl.sum(is_on, axis=0)
    expert = tl.arange(0, BLOCK_E)
    tl.store(counts_ptr + block.to(tl.int64) * num_experts + expert, count_E, mask=expert < num_experts)
    tl.store(totals_ptr + block, tl.sum(count_E, axis=0))


@triton.jit
def _scan_kernel(counts_ptr, totals_ptr, num_blocks, num_experts, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr):
    """Counts of each block become the counts of all blocks before it; the sum over blocks goes to totals."""
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    before_E = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, num_blocks, BLOCK_B):
        block = first + tl.arange(0, BLOCK_B)
        at = counts_ptr + block[:, None].to(tl.int64) * num_experts + expert[None, :]
        inside = (block[:, None] < num_blocks) & (expert[None, :] < num_experts)
        count_BE = tl.load(at, mask=inside, other=0)
        tl.store(at, tl.cumsum(count_BE, axis=0) - count_BE + before_E[None, :], mask=inside)
        before_E += tl.sum(count_BE, axis=0)
    tl.store(totals_ptr + expert, before_E.to(tl.int64), mask=expert < num_experts)


@triton.jit
def _write_kernel(
    map_ptr, before_ptr, of_block_ptr, of_expert_ptr, token_ptr, pair_ptr, row_ptr, expert_offsets_ptr,
    token_offsets_ptr, num_pairs_ptr, num_tokens, num_experts, num_blocks, length,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    token = program * BLOCK_T + tl.arange(0, BLOCK_T)
    is_on, pair = _load_map(map_ptr, program * BLOCK_T, num_tokens, num_experts, BLOCK_T, BLOCK_E)
    of_expert_E = tl.load(of_expert_ptr + expert, mask=expert < num_experts, other=0)
    start_E = tl.cumsum(of_expert_E, axis=0) - of_expert_E
    if program == 0:
        tl.store(expert_offsets_ptr + expert, tl.minimum(start_E, length), mask=expert < num_experts)
        num_pairs = tl.sum(of_expert_E, axis=0)
        tl.store(num_pairs_ptr, num_pairs)
        tl.store(expert_offsets_ptr + num_experts, tl.minimum(num_pairs, length))
        tl.store(token_offsets_ptr + num_tokens, tl.minimum(num_pairs, length))
    earlier = tl.zeros([BLOCK_B], tl.int64)
    for first in range(0, program, BLOCK_B):
        block = first + tl.arange(0, BLOCK_B)
        earlier += tl.load(of_block_ptr + block, mask=block < program, other=0)
    of_token_T = tl.sum(is_on, axis=1)
    start_T = tl.sum(earlier, axis=0) + tl.cumsum(of_token_T, axis=0) - of_token_T
    tl.store(token_offsets_ptr + token, tl.minimum(start_T, length), mask=token < num_tokens)
    before_E = tl.load(before_ptr + program.to(tl.int64) * num_experts + expert, mask=expert < num_experts, other=0)
    row = (start_E + before_E)[None, :] + tl.cumsum(is_on, axis=0) - is_on
    place = start_T[:, None] + tl.cumsum(is_on, axis=1) - is_on
    is_kept = (is_on > 0) & (row < length)
    tl.store(token_ptr + row, tl.broadcast_to(token[:, None].to(tl.int64), [BLOCK_T, BLOCK_E]), mask=is_kept)
    tl.store(pair_ptr + row, pair, mask=is_kept)
    tl.store(row_ptr + place, tl.minimum(row, length - 1), mask=(is_on > 0) & (place < length))
