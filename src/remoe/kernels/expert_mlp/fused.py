"""The fused path of GPUs: gathered rows, SwiGLU inside the products, gather-sum, no waiting for counts.

Products are Triton's, or QuACK's or torch's where the table of choices says so; all else is Triton's. Rows beyond what
fits at once are worked off in chunks of the expert-sorted list: the forward pass then keeps the pre-activations of the
first chunk, and the backward pass computes those of the others again. Outputs and gradients of chunks are added up in
fp32, those of the matrices in the caller's sums where it has some.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from types import ModuleType

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from remoe.kernels.expert_mlp import matmul_kernels as matmul
from remoe.kernels.expert_mlp import rows_kernels as rows
from remoe.kernels.expert_mlp.chunks import Chunk, chunks_of, kept_rows
from remoe.kernels.expert_mlp.sums import Sums, added
from remoe.kernels.expert_mlp.tiles import IN_PLACE_OF_GROUPED_MM, Choices, Quack, QuackTiles, Sizes, Tiles, choose

Lists = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
CHUNKS = True
_QUACKS_LARGEST = 2**31
"""Numbers in a matrix; larger ones were not tried, and are multiplied by Triton."""


@dataclass(frozen=True)
class Call:
    """What the launches of one call share."""

    lists: Lists
    weights_TE: Tensor
    choices: Choices
    num_experts: int
    hidden_size: int
    expert_size: int
    chunks: list[Chunk]
    """Those that are kept, then the others."""
    tile_maps: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Made so far, by first row of the chunk and rows of a tile."""
    starts: dict[int, Tensor] = field(default_factory=dict)
    """Where each expert's rows begin in a chunk, and the end of all, [E+1] in int32; made so far, by its first row."""
    tokens: dict[int, Tensor] = field(default_factory=dict)
    """The token of each row of a chunk in int32; made so far, by its first row."""

    @property
    def num_rows(self) -> int:
        """Rows that the lists have room for."""
        return self.lists[0].shape[0]

    @property
    def end(self) -> Tensor:
        """The number of rows, on the device."""
        return self.lists[3][-1:]

    @property
    def is_whole(self) -> bool:
        """Whether no row is beyond the first chunk."""
        return len(self.chunks) <= 1

    def each_chunk(self) -> Iterator[Chunk]:
        """One after the other, with what its products read."""
        for chunk in self.chunks:
            if self.choices.reads_starts:  # made first: QuACK's products read it before the kernel before them ends
                starts = self.lists[3] if self.is_whole else (self.lists[3] - chunk.first).clamp(0, chunk.size)
                self.starts[chunk.first] = starts.to(torch.int32)
            yield chunk

    def token(self, chunk: Chunk) -> Tensor:
        """The token of each row of a chunk."""
        return self.lists[0][chunk.first :]

    def token_int32(self, chunk: Chunk) -> Tensor:
        """The same in int32, as QuACK's products read it."""
        if chunk.first not in self.tokens:
            self.tokens[chunk.first] = self.token(chunk)[: chunk.size].to(torch.int32)
        return self.tokens[chunk.first]

    def pair(self, chunk: Chunk) -> Tensor:
        """token * E + expert of each row of a chunk."""
        return self.lists[1][chunk.first :]


def forward(
    hidden_TH: Tensor, weights_TE: Tensor, gate_up_proj: Tensor, down_proj: Tensor, lists: Lists, row_cap: int,
    quack: Quack = "never",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See remoe::expert_mlp. Keeps the pre-activations of the first chunk of rows [N, 2F]."""
    call = _call(weights_TE, down_proj, lists, row_cap, quack)
    kept_N2F = hidden_TH.new_empty((kept_rows(call.num_rows, row_cap), gate_up_proj.shape[1]))
    out_TH, sums_TH = _out_and_sums(call, hidden_TH)
    for chunk in call.each_chunk():
        up_N2F = kept_N2F if chunk.is_kept else kept_N2F.new_empty((chunk.size, kept_N2F.shape[1]))
        act_NF = _swiglu(call, chunk, hidden_TH, gate_up_proj, up_N2F)
        y_NH = _rows_matmul(call, chunk, act_NF, down_proj, call.choices.down, transposed=True)
        _combine(call, chunk, y_NH, sums_TH, out_TH, weighted=True)
        del up_N2F, act_NF, y_NH  # else the next chunk's are made beside them
    if call.num_rows == 0:
        out_TH.zero_()
    return out_TH, kept_N2F


def backward(
    grad_out_TH: Tensor, kept_N2F: Tensor, hidden_TH: Tensor, weights_TE: Tensor,
    gate_up_proj: Tensor, down_proj: Tensor, lists: Lists, row_cap: int, sums: Sums | None = None,
    quack: Quack = "never",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See remoe::expert_mlp_backward; with `sums` those of the matrices are added to them and None is returned."""
    call = _call(weights_TE, down_proj, lists, row_cap, quack)
    matrices = gate_up_proj, down_proj
    if call.num_rows == 0:
        zeros = (torch.zeros_like(matrix) for matrix in matrices)
        return torch.zeros_like(hidden_TH), torch.zeros_like(weights_TE), *added(sums, *zeros)
    grad_x_TH, grad_x_sums_TH = _out_and_sums(call, hidden_TH)
    grad_weights_TE = torch.zeros_like(weights_TE)
    grads: Sums | None = None
    gate_up_sum, down_sum = sums or (None, None)
    if sums is None and not call.is_whole:
        gate_up_sum, down_sum = (torch.zeros_like(matrix, dtype=torch.float32) for matrix in matrices)
    for chunk in call.each_chunk():
        up_N2F = kept_N2F if chunk.is_kept else _made_again(call, chunk, hidden_TH, gate_up_proj)
        grad_y = _Source(call, chunk, grad_out_TH)
        grad_up_N2F, act_NF = _swiglu_backward(call, chunk, grad_y, down_proj, up_N2F, grad_weights_TE)
        grad_down = _weight_grad(call, chunk, grad_y, act_NF, call.choices.grad_down, down_sum)
        del act_NF, grad_y
        x = _Source(call, chunk, hidden_TH)
        grad_gate_up = _weight_grad(call, chunk, grad_up_N2F, x, call.choices.grad_up, gate_up_sum)
        del x
        grads = grad_gate_up, grad_down
        grad_x_NH = _rows_matmul(call, chunk, grad_up_N2F, gate_up_proj, call.choices.grad_x, transposed=False)
        _combine(call, chunk, grad_x_NH, grad_x_sums_TH, grad_x_TH, weighted=False)
        del up_N2F, grad_up_N2F, grad_x_NH  # as in the forward pass
    if sums is not None:
        return grad_x_TH, grad_weights_TE, None, None
    assert grads is not None, "there is a chunk"
    return grad_x_TH, grad_weights_TE, grads[0].to(down_proj.dtype), grads[1].to(down_proj.dtype)


def _out_and_sums(call: Call, hidden_TH: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where `_combine` leaves its sums, and in fp32 what those of chunks before the last are."""
    return torch.empty_like(hidden_TH), None if call.is_whole else torch.empty_like(hidden_TH, dtype=torch.float32)


def _made_again(call: Call, chunk: Chunk, hidden_TH: Tensor, gate_up_proj: Tensor) -> Tensor:
    """The pre-activations [N, 2F] of a chunk that were not kept, never interleaved.

    Run as the gradient of the activations is: both multiply rows of H, which may be gathered.
    """
    x = _Source(call, chunk, hidden_TH)
    return _rows_matmul(call, chunk, x, gate_up_proj, call.choices.grad_act, transposed=True)


def _call(weights_TE: Tensor, down_proj: Tensor, lists: Lists, row_cap: int, quack: Quack) -> Call:
    num_experts, hidden_size, expert_size = down_proj.shape
    sizes = Sizes(hidden_size, expert_size, num_experts, lists[0].shape[0] / num_experts)
    widest, num_rows = max(2 * expert_size, hidden_size), lists[0].shape[0]
    fits_quack = widest * max(num_rows, weights_TE.shape[0], num_experts * hidden_size) < _QUACKS_LARGEST
    choices = choose(sizes, down_proj.dtype, quack if fits_quack else "never")
    chunks = chunks_of(num_rows, row_cap, hidden_size, expert_size)
    return Call(lists, weights_TE.contiguous(), choices, num_experts, hidden_size, expert_size, chunks)


def _tile_map(call: Call, chunk: Chunk, block_m: int) -> Tensor:
    key = chunk.first, block_m
    if key not in call.tile_maps:
        call.tile_maps[key] = _new_tile_map(call, chunk, block_m)
    return call.tile_maps[key]


def _new_tile_map(call: Call, chunk: Chunk, block_m: int) -> Tensor:
    num_m = triton.cdiv(chunk.size, block_m) + call.num_experts
    tiles = torch.empty(3 * num_m + 1, dtype=torch.int32, device=call.weights_TE.device)
    block_e = triton.next_power_of_2(call.num_experts)
    block = max(16, min(256, 16384 // block_e))
    rows.tile_map_kernel[(triton.cdiv(num_m, block),)](
        call.lists[3], tiles, call.num_experts, num_m, chunk.first, chunk.size,
        BLOCK_M=block_m, BLOCK_E=block_e, BLOCK=block,
    )  # fmt: skip
    return tiles


def _blocks(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A matrix, or stacked ones as one tall matrix, read in blocks; what lies outside reads as 0."""
    return TensorDescriptor.from_tensor(matrix.flatten(0, -2), [rows, columns])


class _Source:
    """Tokens [T, H] as the rows of a chunk: gathered by the product that reads them, or copied first, once."""

    def __init__(self, call: Call, chunk: Chunk, x_TH: Tensor) -> None:
        self.call, self.chunk, self.x_TH = call, chunk, x_TH
        self._copy_NH: Tensor | None = None

    @property
    def is_gathered(self) -> bool:
        """Whether products shall gather the rows."""
        return not self.call.choices.copies_rows

    @property
    def tensor(self) -> Tensor:
        """What products read: tokens to gather from, or rows."""
        return self.x_TH if self.is_gathered else self.rows

    @property
    def token_N(self) -> Tensor | None:
        """The token of each row in int32, where rows are gathered."""
        return self.call.token_int32(self.chunk) if self.is_gathered else None

    @property
    def rows(self) -> Tensor:
        """The rows [N, H]."""
        if self._copy_NH is None:
            self._copy_NH = _gather(self.call, self.chunk, self.x_TH)
        return self._copy_NH

    def blocks(self, rows: int, columns: int) -> TensorDescriptor | None:
        """The rows to read in blocks, where they are not gathered."""
        return None if self.is_gathered else _blocks(self.rows, rows, columns)


def _swiglu(call: Call, chunk: Chunk, hidden_TH: Tensor, gate_up_proj: Tensor, up_N2F: Tensor) -> Tensor:
    """silu(gate) * up of the chunk's rows [N, F]; writes the pre-activations."""
    tiles, x = call.choices.swiglu, _Source(call, chunk, hidden_TH)
    act_NF = up_N2F.new_empty((chunk.size, call.expert_size))
    if isinstance(tiles, QuackTiles):
        _quack().swiglu(tiles, x.tensor, x.token_N, gate_up_proj, call.starts[chunk.first], up_N2F, act_NF)
        return act_NF
    tile_map, num_n = _tile_map(call, chunk, tiles.m), triton.cdiv(call.expert_size, tiles.n)
    num_m = len(tile_map) // 3
    num_programs = min(num_m * num_n, _resident_programs(act_NF.device, tiles.m, 2 * tiles.n))
    gates_and_ups = gate_up_proj.reshape(2 * call.num_experts, call.expert_size, call.hidden_size)
    matmul.swiglu_fwd_kernel[(num_programs,)](
        x.tensor, x.blocks(tiles.m, tiles.k), TensorDescriptor.from_tensor(gates_and_ups, [2, tiles.n, tiles.k]),
        call.token(chunk), tile_map, up_N2F, act_NF,
        *(TensorDescriptor.from_tensor(out.view(chunk.size, -1, call.expert_size), [tiles.m, 1, tiles.n])
          for out in (up_N2F, act_NF)),
        call.hidden_size, call.expert_size, num_m, num_n, GATHER=x.is_gathered, **tiles.constants(up_N2F.dtype),
    )  # fmt: skip
    return act_NF


def _swiglu_backward(
    call: Call, chunk: Chunk, grad_y: _Source, down_proj: Tensor, up_N2F: Tensor, grad_weights_TE: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the pre-activations and gate * act; writes the chunk's gate gradients."""
    act_NF = _rows_matmul(call, chunk, grad_y, down_proj, call.choices.grad_act, transposed=False)
    grad_up_N2F = torch.empty_like(up_N2F) if chunk.is_kept else up_N2F  # what was made again is nobody else's
    block_f = min(1024, triton.next_power_of_2(call.expert_size))
    block_r = max(1, 2048 // block_f)
    is_interleaved = call.choices.interleaves and chunk.is_kept
    rows.swiglu_bwd_kernel[(triton.cdiv(chunk.size, block_r),)](
        act_NF, up_N2F, grad_up_N2F, call.weights_TE, call.pair(chunk), grad_weights_TE, call.end, call.expert_size,
        chunk.first, chunk.size, BLOCK_R=block_r, BLOCK_F=block_f, INTERLEAVED=is_interleaved,
    )  # fmt: skip
    return grad_up_N2F, act_NF


def _rows_matmul(
    call: Call, chunk: Chunk, x: Tensor | _Source, weight: Tensor, tiles: Tiles | QuackTiles | None, *, transposed: bool
) -> Tensor:
    """Rows through their expert's matrix: stored [N, K] where `transposed`, else [K, N]."""
    if tiles is None:
        rows_NK = x.rows if isinstance(x, _Source) else x
        return F.grouped_mm(rows_NK, weight.transpose(1, 2) if transposed else weight, offs=_ends(call, chunk))
    num_out, num_in = weight.shape[1:] if transposed else weight.shape[:0:-1]
    if isinstance(tiles, QuackTiles):
        x_rows, token_N = _to_gather(x)
        out = x_rows.new_empty((chunk.size, num_out))
        weight_ENK = weight if transposed else weight.mT
        _quack().rows_matmul(tiles, x_rows, token_N, weight_ENK, call.starts[chunk.first], out)
        return out
    x_rows, x_blocks, gathers = _side(x, tiles.m, tiles.k)
    out = x_rows.new_empty((chunk.size, num_out))
    tile_map, num_n = _tile_map(call, chunk, tiles.m), triton.cdiv(num_out, tiles.n)
    num_m = len(tile_map) // 3
    weight_block = (tiles.n, tiles.k) if transposed else (tiles.k, tiles.n)
    matmul.rows_matmul_kernel[(num_m * num_n,)](
        x_rows, x_blocks, _blocks(weight, *weight_block), call.token(chunk), tile_map, out, num_in, num_out,
        num_m, num_n, GATHER=gathers, TRANSPOSED=transposed, **tiles.constants(out.dtype),
    )  # fmt: skip
    return out


def _weight_grad(
    call: Call, chunk: Chunk, left: Tensor | _Source, right: Tensor | _Source, tiles: Tiles | QuackTiles | None,
    matrix_sum: Tensor | None,
) -> Tensor:  # fmt: skip
    """out[e] = left^T right over the expert's rows; or the sum, with that added."""
    if isinstance(tiles, QuackTiles):
        return _quack_weight_grad(call, chunk, left, right, tiles, matrix_sum)
    if tiles is None and matrix_sum is None:
        return _grouped_weight_grad(call, chunk, left, right)
    tiles = tiles or IN_PLACE_OF_GROUPED_MM  # which cannot add to what is there
    left_rows, left_blocks, gathers_left = _side(left, tiles.k, tiles.m)
    right_rows, right_blocks, gathers_right = _side(right, tiles.k, tiles.n)
    num_left, num_right = left_rows.shape[1], right_rows.shape[1]
    out = left_rows.new_empty((call.num_experts, num_left, num_right)) if matrix_sum is None else matrix_sum
    num_m, num_n = triton.cdiv(num_left, tiles.m), triton.cdiv(num_right, tiles.n)
    num_programs = min(call.num_experts * num_m * num_n, _resident_programs(out.device, tiles.m, tiles.n))
    matmul.weight_grad_kernel[(num_programs,)](
        left_rows, right_rows, left_blocks, right_blocks, call.token(chunk), call.lists[3],
        TensorDescriptor.from_tensor(out, [1, tiles.m, tiles.n // 4]), num_left, num_right, call.num_experts,
        chunk.first, chunk.size, num_m, num_n, GATHER_LEFT=gathers_left, GATHER_RIGHT=gathers_right,
        ADD=matrix_sum is not None, **tiles.constants(left_rows.dtype),
    )  # fmt: skip
    return out


@cache
def _resident_programs(device: torch.device, m: int, n: int) -> int:
    """Programs of a product that run at a time: a multiprocessor's registers hold the sums of so many tiles."""
    if device.type != "cuda":  # Triton's interpreter
        return 4
    tiles_at_a_time = max(1, min(8, 128 * 256 // (m * n)))
    return torch.cuda.get_device_properties(device).multi_processor_count * tiles_at_a_time


def _side(side: "Tensor | _Source", rows: int, columns: int) -> tuple[Tensor, TensorDescriptor | None, bool]:
    """What a product over rows reads: the tensor, its blocks where they are not gathered, and whether they are."""
    if isinstance(side, Tensor):
        return side, _blocks(side, rows, columns), False
    return side.tensor, side.blocks(rows, columns), side.is_gathered


def _grouped_weight_grad(call: Call, chunk: Chunk, left: Tensor | _Source, right: Tensor | _Source) -> Tensor:
    left_NM = left.rows if isinstance(left, _Source) else left
    right_NK = right.rows if isinstance(right, _Source) else right
    out = F.grouped_mm(left_NM.t(), right_NK, offs=_ends(call, chunk))
    block = 4096
    rows.zero_idle_kernel[(call.num_experts, triton.cdiv(out[0].numel(), block))](
        out, call.lists[3], out[0].numel(), BLOCK=block
    )
    return out


def _quack_weight_grad(
    call: Call, chunk: Chunk, left: Tensor | _Source, right: Tensor | _Source, tiles: QuackTiles,
    matrix_sum: Tensor | None,
) -> Tensor:  # fmt: skip
    (left_rows, left_token_N), (right_rows, right_token_N) = _to_gather(left), _to_gather(right)
    shape = call.num_experts, left_rows.shape[1], right_rows.shape[1]
    out = left_rows.new_empty(shape) if matrix_sum is None else matrix_sum
    product = partial(_quack().weight_grad, tiles, call.starts[chunk.first], add=matrix_sum is not None)
    if isinstance(right, _Source):  # the side that may be gathered comes first
        product(right_rows, right_token_N, left_rows, out.mT)
    else:
        product(left_rows, left_token_N, right_rows, out)
    return out


def _to_gather(side: Tensor | _Source) -> tuple[Tensor, Tensor | None]:
    """What QuACK's products read: rows, or tokens and which of them each row is."""
    return (side.tensor, side.token_N) if isinstance(side, _Source) else (side, None)


@cache
def _quack() -> ModuleType:
    return import_module("remoe.kernels.expert_mlp.quack_products")  # an extra: only where the choices name it


def _ends(call: Call, chunk: Chunk) -> Tensor:
    return call.starts[chunk.first][1:]


def _gather(call: Call, chunk: Chunk, x_TH: Tensor) -> Tensor:
    out = x_TH.new_empty((chunk.size, call.hidden_size))
    block_h = min(1024, triton.next_power_of_2(call.hidden_size))
    block_r = max(1, 4096 // block_h)
    rows.gather_kernel[(triton.cdiv(chunk.size, block_r),)](
        x_TH, call.token(chunk), call.end, out, call.hidden_size, chunk.first, chunk.size,
        BLOCK_R=block_r, BLOCK_H=block_h,
    )  # fmt: skip
    return out


def _combine(
    call: Call, chunk: Chunk, rows_NH: Tensor, sums_TH: Tensor | None, out_TH: Tensor, *, weighted: bool
) -> None:  # fmt: skip
    """Add up tokens' rows: of chunks before the last in `sums_TH`, of all in `out_TH`."""
    _, _, row_N, _, token_offsets = call.lists
    num_tokens = out_TH.shape[0]
    blocks = rows.combine_blocks(call.num_rows, num_tokens, call.hidden_size)
    rows.combine_kernel[(num_tokens, triton.cdiv(call.hidden_size, blocks["BLOCK_H"]))](
        rows_NH, row_N, token_offsets, call.weights_TE, call.pair(chunk), sums_TH,
        out_TH if chunk == call.chunks[-1] else sums_TH, call.hidden_size, chunk.first, chunk.size,
        WEIGHTED=weighted, ADD=not chunk.is_kept, **blocks,
    )  # fmt: skip
