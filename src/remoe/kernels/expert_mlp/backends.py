"""The ways to run the experts, and which one a tensor gets."""

import re
import warnings
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Protocol, cast

import torch
from torch import Tensor

from remoe.errors import ConfigError, MissingExtraError, RemoeWarning
from remoe.kernels.expert_mlp import grouped, per_expert
from remoe.kernels.expert_mlp.sums import Sums

NAMES = ("auto", "triton", "quack", "grouped_mm", "plain")
"""auto: the fastest there is, product by product; triton: our kernels (GPU, bf16, fp16, fp32), with torch's grouped
product where it is faster; quack: QuACK's products beside our kernels (Hopper, bf16, fp16); grouped_mm: torch's grouped
product (GPU, bf16); plain: one matrix product an expert, anywhere."""

_QUACK_VERSIONS = (0, 3, 11), (0, 4)
"""From the first, which can read gate and up columns as halves, to before the second: later ones were not tried."""
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Lists = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Of hidden_TH, weights_TE, gate_up_proj and down_proj; None for a matrix whose gradient was added to its sum."""


class Backend(Protocol):
    """What has the two passes of remoe::expert_mlp."""

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
    usable = _usable(hidden_TH.device, hidden_TH.dtype, hidden_TH.shape[-1] % 8 == 0)
    if name != "auto" and name not in usable:
        raise ConfigError(
            f"kernels is {name!r}, must be one of auto, {', '.join(usable)} for {hidden_TH.dtype} of width "
            f"{hidden_TH.shape[-1]} on {hidden_TH.device.type}{_what_is_missing(name, hidden_TH)}"
        )
    return _load(usable[0] if name == "auto" else name, name == "auto")


def _what_is_missing(name: str, hidden_TH: Tensor) -> str:
    if name == "quack" and not (_is_hopper(hidden_TH.device) and hidden_TH.dtype in (torch.bfloat16, torch.float16)):
        return "; QuACK's products are for Hopper GPUs, bf16 and fp16"
    library = {"triton": "triton", "quack": "quack-kernels"}.get(name)
    return f"; {MissingExtraError(library, name)}" if library and not find_spec(name) else ""


@cache
def _usable(device: torch.device, dtype: torch.dtype, is_aligned: bool) -> tuple[str, ...]:
    """Names of the back-ends that can run, the best first."""
    names: list[str] = []
    if device.type == "cuda" and is_aligned:  # blocks are read along rows of 16 bytes
        if find_spec("triton") and dtype in TRITON_DTYPES:
            if dtype != torch.float32 and has_quack(device):
                names.append("quack")
            names.append("triton")
        if dtype == torch.bfloat16:
            names.append("grouped_mm")
    return (*names, "plain")


def has_quack(device: torch.device) -> bool:
    """Whether this is a Hopper GPU, and QuACK is there for it."""
    return _is_hopper(device) and _imports_quack()


def _is_hopper(device: torch.device) -> bool:
    is_nvidia = device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available()
    return is_nvidia and torch.cuda.get_device_capability(device)[0] == 9


@cache
def _imports_quack() -> bool:
    """Whether QuACK is there, of a version that we call, with all that it needs."""
    if not find_spec("quack"):
        return False
    try:
        found = version("quack-kernels")
        first, after = _QUACK_VERSIONS
        if not first <= tuple(int(part) for part in re.findall(r"\d+", found)[:3]) < after:
            raise ImportError(f"version {found} is installed, 0.3.11 or a later 0.3 is needed")
        import_module("remoe.kernels.expert_mlp.quack_products")
    except Exception as error:  # noqa: BLE001 - libraries that do not go together fail in their own ways
        fix = "pip install 'remoe[quack]'"
        warnings.warn(f"QuACK's products are not used, Triton's are: {error}; fix: {fix}", RemoeWarning, stacklevel=2)
        return False
    return True


@cache
def _load(name: str, is_auto: bool) -> Backend:
    if name in ("triton", "quack"):
        from remoe.kernels.expert_mlp import fused  # triton is an extra: first needed on a GPU

        quack = "never" if name == "triton" else "where faster" if is_auto else "always"
        passes = {"forward": partial(fused.forward, quack=quack), "backward": partial(fused.backward, quack=quack)}
        return cast(Backend, SimpleNamespace(CHUNKS=fused.CHUNKS, **passes))
    return cast(Backend, grouped if name == "grouped_mm" else per_expert)
