"""The ways to run the experts, and which one a tensor gets."""

from functools import cache
from importlib.util import find_spec
from typing import Protocol, cast

import torch
from torch import Tensor

from remoe.errors import ConfigError, MissingExtraError
from remoe.kernels.expert_mlp import grouped, per_expert
from remoe.kernels.expert_mlp.sums import Sums

NAMES = ("auto", "triton", "grouped_mm", "plain")
"""auto: the fastest there is; triton: our kernels (GPU, bf16, fp16, fp32); grouped_mm: torch's grouped product (GPU,
bf16); plain: one matrix product an expert, anywhere."""

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Lists = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Of hidden_TH, weights_TE, gate_up_proj and down_proj; None for a matrix whose gradient was added to its sum."""


class Backend(Protocol):
    """A module with the two passes of remoe::expert_mlp."""

    CHUNKS: bool
    """Whether rows above the cap are worked off in chunks."""

    def forward(
        self, hidden_TH: Tensor, weights_TE: Tensor, gate_up_proj: Tensor, down_proj: Tensor, lists: Lists, row_cap: int
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def backward(
        self, grad_out_TH: Tensor, up_N2F: Tensor, hidden_TH: Tensor, weights_TE: Tensor, gate_up_proj: Tensor,
        down_proj: Tensor, lists: Lists, row_cap: int, sums: Sums | None = None,
    ) -> Gradients: ...  # fmt: skip


def pick(name: str, hidden_TH: Tensor) -> Backend:
    """The named back-end, or the best for this tensor's device and dtype. Raises ConfigError for one it cannot use."""
    usable = _usable(hidden_TH.device.type, hidden_TH.dtype, hidden_TH.shape[-1] % 8 == 0)
    if name != "auto" and name not in usable:
        is_missing = name == "triton" and not find_spec("triton")
        missing = f"; {MissingExtraError('triton', 'triton')}" if is_missing else ""
        raise ConfigError(
            f"kernels is {name!r}, must be one of auto, {', '.join(usable)} for {hidden_TH.dtype} of width "
            f"{hidden_TH.shape[-1]} on {hidden_TH.device.type}{missing}"
        )
    return _load(usable[0] if name == "auto" else name)


@cache
def _usable(device: str, dtype: torch.dtype, is_aligned: bool) -> tuple[str, ...]:
    """Names of the back-ends that can run, the best first."""
    names: list[str] = []
    if device == "cuda" and is_aligned:  # blocks are read along rows of 16 bytes
        if find_spec("triton") and dtype in TRITON_DTYPES:
            names.append("triton")
        if dtype == torch.bfloat16:
            names.append("grouped_mm")
    return (*names, "plain")


def _load(name: str) -> Backend:
    if name == "triton":
        from remoe.kernels.expert_mlp import fused  # triton is an extra: first needed on a GPU

        return cast(Backend, fused)
    return cast(Backend, grouped if name == "grouped_mm" else per_expert)
