"""What the commands' words mean."""

import torch

from remoe.errors import ConfigError, one_of

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_named(name: str, device: torch.device) -> torch.dtype:
    """The type of this name; without one bf16 on a GPU and fp32 on a CPU, whose bf16 products are slow."""
    if not name:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise ConfigError(f"--dtype is {name!r}, {one_of(name, list(_DTYPES))}")
    return _DTYPES[name]
