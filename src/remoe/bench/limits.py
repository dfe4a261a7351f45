"""What the machine can do at best: the rate of a large matrix product and of a copy, measured in the same process."""

from dataclasses import dataclass

import torch

from remoe.bench.clock import Clock, free
from remoe.bench.shapes import LayerShape

_SIDE = {"cuda": 8192, "cpu": 1024}
_COPY_BYTES = {"cuda": 2 << 30, "cpu": 64 << 20}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Measured rates of one device and type."""

    matmul_tflops: float
    """A square product: 8192 on a GPU, 1024 on a CPU."""
    copy_gb_per_second: float
    """Bytes read plus bytes written."""
    bytes_a_number: int

    def floor_ms(self, shape: LayerShape, backward: bool) -> float:
        """The least time of a layer: its products at the matmul rate or its traffic at the copy rate."""
        compute = shape.flops(backward) / self.matmul_tflops / 1e9
        return max(compute, shape.traffic(self.bytes_a_number, backward) / self.copy_gb_per_second / 1e6)

    def is_memory_bound(self, shape: LayerShape, backward: bool) -> bool:
        """Whether the traffic sets the floor."""
        return self.floor_ms(shape, backward) > shape.flops(backward) / self.matmul_tflops / 1e9


def measure_limits(clock: Clock, dtype: torch.dtype) -> Limits:
    """Time a large product and a large copy."""
    limits = Limits(
        matmul_tflops=_matmul_tflops(clock, dtype),
        copy_gb_per_second=_copy_gb_per_second(clock),
        bytes_a_number=dtype.itemsize,
    )
    free(clock.device)
    return limits


def _matmul_tflops(clock: Clock, dtype: torch.dtype) -> float:
    side = _SIDE[clock.device.type]
    a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
    return 2 * side**3 / clock.median_ms(lambda: a @ b) / 1e9


def _copy_gb_per_second(clock: Clock) -> float:
    source = torch.zeros(_COPY_BYTES[clock.device.type], dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / clock.median_ms(lambda: target.copy_(source)) / 1e6
