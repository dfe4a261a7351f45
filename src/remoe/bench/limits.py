"""What the machine can do at best: the rate of a large matrix product and of a copy, measured in the same process."""

from dataclasses import dataclass

import torch

from remoe.bench.clock import Clock, free
from remoe.bench.shapes import LayerShape
from remoe.model import ReMoEConfig
from remoe.model.size import flops_per_token, parameter_count

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


@dataclass(frozen=True, kw_only=True)
class TextLimits:
    """The most tokens a second of a model in inference: its products at the matmul rate, or its bytes read once."""

    limits: Limits
    config: ReMoEConfig

    def prefill(self) -> float:
        """Many tokens at once: bound by products. As `flops_per_token` counts, a third of it is the forward pass."""
        return self.limits.matmul_tflops * 1e12 / self._flops()

    def decode(self, batch: int, context: int) -> float:
        """One token of each of `batch` texts: the weights of the experts that their tokens use together, and caches.

        With k of E experts a token, evenly, E (1 - (1 - k/E)^batch) experts of a layer are read.
        """
        moe, count = self.config.moe, parameter_count(self.config)
        an_expert = (count.total - count.active) / max(1, moe.num_experts - moe.top_k)
        used = moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** batch)
        weights = count.active + an_expert * (used - moe.top_k) - self._embedding()
        cache = 2 * batch * context * self.config.num_layers * self.config.kv_heads * self.config.head_width
        reading = (weights + cache) * self.limits.bytes_a_number / self.limits.copy_gb_per_second / 1e9
        return batch / max(reading, batch * self._flops() / self.limits.matmul_tflops / 1e12)

    def _flops(self) -> float:
        return flops_per_token(self.config, 1) / 3

    def _embedding(self) -> int:
        """A table of which a token reads one row; a tied one is read as the head."""
        return 0 if self.config.tie_embeddings else (self.config.vocab_size or 0) * self.config.hidden_size
