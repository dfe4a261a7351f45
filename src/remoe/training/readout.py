"""Numbers on their way from the device to the host: one copy for all of them, read when they have arrived."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Readout:
    """A snapshot of device values. Made without waiting; `read` waits for the copy, so call it a step later."""

    @torch.no_grad()
    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._shapes = {name: value.shape for name, value in values.items()}
        flat = torch.cat([value.detach().reshape(-1).to(torch.float64) for value in values.values()])
        self._arrived = None
        if flat.device.type == "cuda":
            self._host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._host.copy_(flat, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host = flat

    @property
    def has_arrived(self) -> bool:
        """Whether `read` would not wait."""
        return self._arrived is None or self._arrived.query()

    def read(self) -> dict[str, Any]:
        """The values as floats; a vector or matrix as a flat list."""
        if self._arrived is not None:
            self._arrived.synchronize()
        sizes = [shape.numel() for shape in self._shapes.values()]
        parts = self._host.split(sizes)
        return {
            name: part.tolist() if shape else part.item()
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }
