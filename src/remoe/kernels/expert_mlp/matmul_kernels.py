# ruff: noqa: SIM108  (a ternary of a constexpr is evaluated on both sides)
"""Triton kernels of the expert matrix products: tiles of rows of one expert each, counts read on the device.

The products of rows walk a tile map (rows_kernels.tile_map): tile m holds rows first[m] to last[m] of expert[m]. Row
numbers count from the first row of the chunk at hand. Products accumulate in fp32.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Row tile and column tile of a program: GROUP_M row tiles in turn use one column tile while it is in the cache."""
    width = GROUP_M * num_n
    first_m = (pid // width) * GROUP_M
    size_m = tl.minimum(num_m - first_m, GROUP_M)
    return first_m + (pid % width) % size_m, (pid % width) // size_m


@triton.jit
def _rows_of(tile_ptr, m, num_m):
    return tl.load(tile_ptr + m), tl.load(tile_ptr + num_m + m), tl.load(tile_ptr + 2 * num_m + m)


@triton.jit
def swiglu_fwd_kernel(
    x_ptr, x_desc, w_desc, token_ptr, tile_ptr, up_ptr, act_ptr, up_desc, act_desc, H, F, num_m, num_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    GATHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """act = silu(gate) * up of rows [N, F], with gate and up = x W^T kept in up_ptr [N, 2F]; x gathered or in rows.

    W is read as [2E, F, H], whose block of two is a tile's gate and up columns: one product. Programs take one tile
    after the other, so that the bulk copies which write a whole tile go on while the next one is computed.
    """
    tiles_m = tl.load(tile_ptr + 3 * num_m)
    for tile in tl.range(tl.program_id(0), tiles_m * num_n, tl.num_programs(0)):
        m, n = _tile(tile, tiles_m, num_n, GROUP_M)
        expert, first, last = _rows_of(tile_ptr, m, num_m)
        row_M = first + tl.arange(0, BLOCK_M)
        k_K = tl.arange(0, BLOCK_K)
        if GATHER:
            token_M = tl.load(token_ptr + row_M, mask=row_M < last, other=0)
            x_MK = x_ptr + token_M[:, None] * H + k_K[None, :]
        both_M2N = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        for k in range(0, H, BLOCK_K):
            if GATHER:
                x = tl.load(x_MK + k, mask=k_K[None, :] < H - k, other=0.0)
            else:
                x = x_desc.load([first, k])
            w = tl.reshape(w_desc.load([2 * expert, n * BLOCK_N, k]), (2 * BLOCK_N, BLOCK_K))
            both_M2N = tl.dot(x, w.T, both_M2N, input_precision=PRECISION)
        gate_MN, up_MN = _halves(both_M2N.to(act_ptr.dtype.element_ty), BLOCK_M, 2 * BLOCK_N)
        gate = gate_MN.to(tl.float32)  # rounded: what the backward pass will read
        act_MN = (gate * tl.sigmoid(gate) * up_MN.to(tl.float32)).to(act_ptr.dtype.element_ty)
        if first + BLOCK_M <= last:
            up_desc.store([first, 0, n * BLOCK_N], tl.reshape(gate_MN, (BLOCK_M, 1, BLOCK_N)))
            up_desc.store([first, 1, n * BLOCK_N], tl.reshape(up_MN, (BLOCK_M, 1, BLOCK_N)))
            act_desc.store([first, 0, n * BLOCK_N], tl.reshape(act_MN, (BLOCK_M, 1, BLOCK_N)))
        else:  # the rows after the last are another expert's
            f_N = n * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = (row_M[:, None] < last) & (f_N[None, :] < F)
            tl.store(act_ptr + row_M[:, None].to(tl.int64) * F + f_N[None, :], act_MN, mask=inside)
            at = row_M[:, None].to(tl.int64) * (2 * F) + f_N[None, :]
            tl.store(up_ptr + at, gate_MN, mask=inside)
            tl.store(up_ptr + at + F, up_MN, mask=inside)


@triton.jit
def rows_matmul_kernel(
    x_ptr, x_desc, w_desc, token_ptr, tile_ptr, out_ptr, K, N, num_m, num_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [rows, N] = x [rows, K] times the expert's matrix: stored [N, K] where TRANSPOSED, else [K, N]."""
    m, n = _tile(tl.program_id(0), num_m, num_n, GROUP_M)
    expert, first, last = _rows_of(tile_ptr, m, num_m)
    if expert < 0:
        return
    row_M = first + tl.arange(0, BLOCK_M)
    k_K = tl.arange(0, BLOCK_K)
    if GATHER:
        token_M = tl.load(token_ptr + row_M, mask=row_M < last, other=0)
        x_MK = x_ptr + token_M[:, None] * K + k_K[None, :]
    out_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        if GATHER:
            x = tl.load(x_MK + k, mask=k_K[None, :] < K - k, other=0.0)
        else:
            x = x_desc.load([first, k])
        if TRANSPOSED:
            out_MN = tl.dot(x, w_desc.load([expert * N + n * BLOCK_N, k]).T, out_MN, input_precision=PRECISION)
        else:
            out_MN = tl.dot(x, w_desc.load([expert * K + k, n * BLOCK_N]), out_MN, input_precision=PRECISION)
    n_N = n * BLOCK_N + tl.arange(0, BLOCK_N)
    at = row_M[:, None].to(tl.int64) * N + n_N[None, :]
    tl.store(out_ptr + at, out_MN.to(out_ptr.dtype.element_ty), mask=(row_M[:, None] < last) & (n_N[None, :] < N))


@triton.jit
def weight_grad_kernel(
    left_ptr, right_ptr, left_desc, right_desc, token_ptr, offsets_ptr, out_desc, M, N, num_experts,
    first_row, num_rows, num_m, num_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[e] [M, N] = sum over the expert's rows of left [rows, M]^T right [rows, N]; either side may be gathered.

    With ADD the sum is added to what is there, each number by one program: the same bits each run. Programs take one
    tile after the other, so that the bulk copies which write a tile go on while the next one is computed.
    """
    tiles_each = num_m * num_n
    k_K = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), num_experts * tiles_each, tl.num_programs(0)):
        expert = tile // tiles_each
        m, n = _tile(tile % tiles_each, num_m, num_n, GROUP_M)
        begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
        first = tl.minimum(tl.maximum(begin - first_row, 0), num_rows).to(tl.int32)
        last = tl.minimum(tl.maximum(end - first_row, 0), num_rows).to(tl.int32)
        m_M = m * BLOCK_M + tl.arange(0, BLOCK_M)
        n_N = n * BLOCK_N + tl.arange(0, BLOCK_N)
        sum_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        whole = first + (last - first) // BLOCK_K * BLOCK_K
        for k in range(first, whole, BLOCK_K):
            if GATHER_LEFT:
                token_K = tl.load(token_ptr + k + k_K)
                left = tl.load(left_ptr + token_K[:, None] * M + m_M[None, :], mask=m_M[None, :] < M, other=0.0)
            else:
                left = left_desc.load([k, m * BLOCK_M])
            if GATHER_RIGHT:
                token_K = tl.load(token_ptr + k + k_K)
                right = tl.load(right_ptr + token_K[:, None] * N + n_N[None, :], mask=n_N[None, :] < N, other=0.0)
            else:
                right = right_desc.load([k, n * BLOCK_N])
            sum_MN = tl.dot(left.T, right, sum_MN, input_precision=PRECISION)
        if whole < last:  # the rows after these are another expert's, or were never written
            row_K = whole + k_K
            is_row_K = row_K < last
            left_K, right_K = row_K.to(tl.int64), row_K.to(tl.int64)
            if GATHER_LEFT:
                left_K = tl.load(token_ptr + row_K, mask=is_row_K, other=0)
            if GATHER_RIGHT:
                right_K = tl.load(token_ptr + row_K, mask=is_row_K, other=0)
            is_left = is_row_K[:, None] & (m_M[None, :] < M)
            is_right = is_row_K[:, None] & (n_N[None, :] < N)
            left = tl.load(left_ptr + left_K[:, None] * M + m_M[None, :], mask=is_left, other=0.0)
            right = tl.load(right_ptr + right_K[:, None] * N + n_N[None, :], mask=is_right, other=0.0)
            sum_MN = tl.dot(left.T, right, sum_MN, input_precision=PRECISION)
        if not ADD or first < last:
            _write(out_desc, sum_MN, expert, m * BLOCK_M, n * BLOCK_N, BLOCK_M, BLOCK_N, ADD)


@triton.jit
def _write(
    out_desc, tile_MN, expert, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """Store or add a tile by quarters of its columns, which need less shared memory than all at once."""
    left_half, right_half = _halves(tile_MN, BLOCK_M, BLOCK_N)
    WIDTH: tl.constexpr = BLOCK_N // 4
    first, second = _halves(left_half, BLOCK_M, 2 * WIDTH)
    third, fourth = _halves(right_half, BLOCK_M, 2 * WIDTH)
    _write_part(out_desc, first, expert, m, n, BLOCK_M, WIDTH, ADD)
    _write_part(out_desc, second, expert, m, n + WIDTH, BLOCK_M, WIDTH, ADD)
    _write_part(out_desc, third, expert, m, n + 2 * WIDTH, BLOCK_M, WIDTH, ADD)
    _write_part(out_desc, fourth, expert, m, n + 3 * WIDTH, BLOCK_M, WIDTH, ADD)


@triton.jit
def _halves(tile_MN, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile_MN, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _write_part(
    out_desc, part_MN, expert, m, n, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    part = tl.reshape(part_MN, (1, BLOCK_M, WIDTH)).to(out_desc.dtype)
    if ADD:
        out_desc.atomic_add([expert, m, n], part)
    else:
        out_desc.store([expert, m, n], part)
