"""Triton kernels that move rows: the tile map, tokens to rows, rows back to tokens, SwiGLU's gradient, zeros.

All read the number of rows on the device; rows are counted from `first_row`, the first of the chunk at hand.
"""

import triton
import triton.language as tl


@triton.jit
def tile_map_kernel(
    offsets_ptr, tile_ptr, num_experts, num_m, first_row, num_rows,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cut each expert's rows in the chunk into tiles of BLOCK_M: expert (-1: no such tile), first row, end of rows.

    tile_ptr [3 num_m + 1]: those of all tiles, each in its turn, and how many tiles there are.
    """
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert_E = tl.arange(0, BLOCK_E)
    is_expert_E = expert_E < num_experts
    begin_E = tl.load(offsets_ptr + expert_E, mask=is_expert_E, other=0)
    end_E = tl.load(offsets_ptr + expert_E + 1, mask=is_expert_E, other=0)
    begin_E = tl.minimum(tl.maximum(begin_E - first_row, 0), num_rows).to(tl.int32)
    end_E = tl.minimum(tl.maximum(end_E - first_row, 0), num_rows).to(tl.int32)
    tiles_E = tl.where(is_expert_E, (end_E - begin_E + BLOCK_M - 1) // BLOCK_M, 0)
    is_before = (tl.cumsum(tiles_E, axis=0)[None, :] <= tile[:, None]) & is_expert_E[None, :]
    expert = tl.sum(is_before.to(tl.int32), axis=1)
    exists = expert < num_experts
    begin = tl.load(offsets_ptr + expert, mask=exists, other=0)
    begin = tl.minimum(tl.maximum(begin - first_row, 0), num_rows).to(tl.int32)
    end = tl.load(offsets_ptr + expert + 1, mask=exists, other=0)
    end = tl.minimum(tl.maximum(end - first_row, 0), num_rows).to(tl.int32)
    tiles_before = tl.sum(tl.where(is_before, tiles_E[None, :], 0), axis=1)
    tl.store(tile_ptr + tile, tl.where(exists, expert, -1), mask=tile < num_m)
    tl.store(tile_ptr + num_m + tile, begin + (tile - tiles_before) * BLOCK_M, mask=tile < num_m)
    tl.store(tile_ptr + 2 * num_m + tile, end, mask=tile < num_m)
    if tl.program_id(0) == 0:
        tl.store(tile_ptr + 3 * num_m, tl.sum(tiles_E, axis=0))


@triton.jit
def gather_kernel(
    x_ptr, token_ptr, end_ptr, out_ptr, H, first_row, num_rows, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr
):
    """out[n] = x[token[n]] for the rows of the chunk."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    h = tl.arange(0, BLOCK_H)
    is_row = row < tl.minimum(tl.load(end_ptr) - first_row, num_rows)
    token = tl.load(token_ptr + row, mask=is_row, other=0)
    for h0 in range(0, H, BLOCK_H):
        inside = is_row[:, None] & (h[None, :] < H - h0)
        x = tl.load(x_ptr + token[:, None] * H + h[None, :] + h0, mask=inside, other=0.0)
        tl.store(out_ptr + row[:, None].to(tl.int64) * H + h[None, :] + h0, x, mask=inside)


@triton.jit
def combine_kernel(
    rows_ptr, row_ptr, offsets_ptr, weights_ptr, pair_ptr, sums_ptr, out_ptr, H, first_row, num_rows,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, WEIGHTED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """out[t] = (sums[t] +) the sum of the token's rows in the chunk, weighted or not, in fp32 and in their order."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    begin, end = tl.load(offsets_ptr + token), tl.load(offsets_ptr + token + 1)
    sum_H = tl.zeros([BLOCK_H], tl.float32)
    for first in range(begin, end, BLOCK_S):
        slot = first + tl.arange(0, BLOCK_S)
        row = tl.load(row_ptr + slot, mask=slot < end, other=-1) - first_row
        is_row = (row >= 0) & (row < num_rows)
        inside = is_row[:, None] & (h[None, :] < H)
        part = tl.load(rows_ptr + row[:, None] * H + h[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            pair = tl.load(pair_ptr + row, mask=is_row, other=0)
            part *= tl.load(weights_ptr + pair, mask=is_row, other=0.0).to(tl.float32)[:, None]
        sum_H += tl.sum(part, axis=0)
    at = token * H + h
    if ADD:
        sum_H += tl.load(sums_ptr + at, mask=h < H, other=0.0)
    tl.store(out_ptr + at, sum_H.to(out_ptr.dtype.element_ty), mask=h < H)


def combine_blocks(num_rows: int, num_tokens: int, hidden_size: int) -> dict[str, int]:
    """Block sizes of `combine_kernel`, which runs a program for each token and BLOCK_H numbers."""
    rows_of_token = triton.next_power_of_2(num_rows // max(1, num_tokens))
    return {"BLOCK_S": max(1, min(8, rows_of_token)), "BLOCK_H": min(1024, triton.next_power_of_2(hidden_size))}


@triton.jit
def swiglu_bwd_kernel(
    act_ptr, up_ptr, grad_up_ptr, weights_ptr, pair_ptr, grad_weights_ptr, end_ptr, F, first_row, num_rows,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """From dA [N, F], before the gate: the gradient of the pre-activations [N, 2F], the gates', and gate * act.

    The gate's gradient is <dA, act> with act computed again, so that the experts' output is never kept. gate * act
    takes the place of dA. Pre-activations may be INTERLEAVED, gate and up of each number; their gradient never is, and
    may take their place where they are not.
    """
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    end = tl.minimum(tl.load(end_ptr) - first_row, num_rows)
    is_row = row_R < end
    width = tl.where(tl.program_id(0) * BLOCK_R < end, F, 0)  # in room for more rows there is nothing to compute
    pair_R = tl.load(pair_ptr + row_R, mask=is_row, other=0)
    weight_R1 = tl.load(weights_ptr + pair_R, mask=is_row, other=0.0).to(tl.float32)[:, None]
    grad_weight_R = tl.zeros([BLOCK_R], tl.float32)
    dtype = act_ptr.dtype.element_ty
    for f in range(0, width, BLOCK_F):
        f_F = f + tl.arange(0, BLOCK_F)
        inside = is_row[:, None] & (f_F[None, :] < F)
        at = row_R[:, None].to(tl.int64) * F + f_F[None, :]
        at_up = row_R[:, None].to(tl.int64) * (2 * F) + f_F[None, :]
        grad_act = tl.load(act_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if INTERLEAVED:
            gate, up = _pairs(up_ptr, row_R, is_row, f, F, BLOCK_R, BLOCK_F)
        else:
            gate = tl.load(up_ptr + at_up, mask=inside, other=0.0)
            up = tl.load(up_ptr + at_up + F, mask=inside, other=0.0)
        gate, up = gate.to(tl.float32), up.to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        act = silu * up
        grad_weight_R += tl.sum(grad_act * act, axis=1)
        grad_act *= weight_R1
        tl.store(act_ptr + at, (act * weight_R1).to(dtype), mask=inside)
        grad_gate = grad_act * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(grad_up_ptr + at_up, grad_gate.to(dtype), mask=inside)
        tl.store(grad_up_ptr + at_up + F, (grad_act * silu).to(dtype), mask=inside)
    tl.store(grad_weights_ptr + pair_R, grad_weight_R.to(grad_weights_ptr.dtype.element_ty), mask=is_row)


@triton.jit
def _pairs(ptr, row_R, is_row, f, F, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    """The first and the second of each pair of numbers, from pair f of rows of F pairs."""
    at_2F = 2 * f + tl.arange(0, 2 * BLOCK_F)
    inside = is_row[:, None] & (at_2F[None, :] < 2 * F)
    both = tl.load(ptr + row_R[:, None].to(tl.int64) * (2 * F) + at_2F[None, :], mask=inside, other=0.0)
    return tl.split(tl.reshape(both, (BLOCK_R, BLOCK_F, 2)))


@triton.jit
def zero_idle_kernel(out_ptr, offsets_ptr, size, BLOCK: tl.constexpr):
    """out[e] [size] = 0 for experts without rows, which torch's grouped product may leave unwritten."""
    expert = tl.program_id(0)
    if tl.load(offsets_ptr + expert) == tl.load(offsets_ptr + expert + 1):
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + expert.to(tl.int64) * size + at, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=at < size)
