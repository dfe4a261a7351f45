"""The expert matrix products by QuACK's CuTe kernels (Hopper, bf16 and fp16), with tiles that are given.

Counts are read on the device, rows after the last one stay as they are, and sizes are free: a kernel is compiled once
for its types and tiles. What each function is given is [rows, …], `starts` [E+1] in int32, and `token_N` in int32 where
rows are gathered from tokens.
"""

# pyright: reportMissingImports=false, reportUnknownVariableType=false
# (an extra)

from quack.gemm import gemm
from quack.gemm_act import gemm_act
from torch import Tensor

from remoe.kernels.expert_mlp.tiles import QuackTiles


def swiglu(
    tiles: QuackTiles, x: Tensor, token_N: Tensor | None, gate_up_proj: Tensor, starts: Tensor, up_N2F: Tensor,
    act_NF: Tensor,
) -> None:  # fmt: skip
    """Write act = silu(gate) * up of rows, and gate, up, gate, up … of each row."""
    gemm_act(
        x, gate_up_proj, up_N2F, None, act_NF, None, "swiglu", **_settings(tiles),
        cu_seqlens_m=starts, A_idx=token_N, concat_layout=("B",),
    )  # fmt: skip


def rows_matmul(
    tiles: QuackTiles, x: Tensor, token_N: Tensor | None, weight_ENK: Tensor, starts: Tensor, out: Tensor
) -> None:
    """Write rows [N, K] through their expert's matrix [N, K], in either order in memory."""
    gemm(x, weight_ENK, out, None, None, **_settings(tiles), cu_seqlens_m=starts, A_idx=token_N)


def weight_grad(
    tiles: QuackTiles, starts: Tensor, left: Tensor, token_N: Tensor | None, right: Tensor, out: Tensor, *, add: bool
) -> None:
    """Write or add left^T right of each expert's rows [E, M, N], in either order in memory; left may be gathered."""
    gemm(
        left.T, right.T, out, None, None, **_settings(tiles),
        cu_seqlens_k=starts, A_idx=token_N, add_to_output=add,
    )  # fmt: skip


def _settings(tiles: QuackTiles) -> dict[str, int | bool]:
    return {
        "tile_M": tiles.m, "tile_N": tiles.n, "cluster_M": tiles.cluster, "cluster_N": 1, "pingpong": tiles.is_pingpong,
    }  # fmt: skip
