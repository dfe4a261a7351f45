"""Where a call's time goes: its kernels, their share, and what the known ones achieve."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from remoe.bench.clock import Clock
from remoe.bench.shapes import LayerShape

Kernel = dict[str, Any]
_MOST = 20

_WORK = (
    ("swiglu_fwd_kernel|GemmGatedSm90", 1, 2),
    ("rows_matmul_kernel", 3, 4),
    ("weight_grad_kernel", 2, 3),
)
"""Our kernels, and QuACK's whose work its name tells (patterns): so many calls a layer and step, and their products in
units of N * H * F multiply-adds. Where a library's products take some of the calls, which ones are left is not known,
and they are not rated."""
_TRAFFIC: tuple[tuple[str, Callable[[LayerShape], int]], ...] = (
    ("gather_kernel", lambda shape: 2 * shape.num_pairs * shape.hidden_size),
    ("combine_kernel", lambda shape: (shape.num_pairs + shape.num_tokens) * shape.hidden_size),
    ("swiglu_bwd_kernel", lambda shape: 6 * shape.num_pairs * shape.expert_size),
)
"""Our kernels, and the numbers that one call reads and writes."""
_ALL_PRODUCTS = 9.0
_PRODUCTS = re.compile(
    r"gemm|grouped|swiglu_fwd|rows_matmul|weight_grad|cutlass|nvjet|matmul|_mm|::mm|addmm", re.IGNORECASE
)


def profile(call: Callable[[], Any], shape: LayerShape, clock: Clock, bytes_a_number: int) -> list[Kernel]:
    """One layer call's kernels by falling time: name, calls, us, share; TFLOP/s or GB/s where the work is known.

    The last row is their sum. Products that share a name, such as those of a library, are rated together under
    "matrix products". Where the layer works in chunks, a call is a part of one, and none is rated by itself.
    """
    kernels = kernels_of(call, clock)
    products = [kernel for kernel in kernels if _PRODUCTS.search(kernel["kernel"])]
    rows = kernels[:_MOST]
    if not _layer_recomputes(kernels):
        rows = [kernel | _rates(kernel, shape, bytes_a_number) for kernel in rows]
    total = _sum("all", kernels, kernels)
    if not products:
        return [*rows, total]
    together = _sum("matrix products", products, kernels)
    return [*rows, together | {"tflops": _tflops(_ALL_PRODUCTS, shape, together["us"])}, total]


def profile_step(call: Callable[[], Any], shape: LayerShape, clock: Clock, bytes_a_number: int) -> list[Kernel]:
    """The same for an optimizer step, whose MoE layers have this shape; only our kernels are rated."""
    kernels = kernels_of(call, clock)
    rows = kernels[:_MOST]
    if not step_recomputes(kernels):
        rows = [kernel | _rates(kernel, shape, bytes_a_number) for kernel in rows]
    return [*rows, _sum("all", kernels, kernels)]


def step_recomputes(kernels: Sequence[Kernel]) -> bool:
    """Whether some layers of a step compute their rows again: then how much work a call is cannot be told."""
    forward, backward = (
        sum(kernel["calls"] for kernel in kernels if re.search(pattern, kernel["kernel"]))
        for pattern in (_WORK[0][0], "swiglu_bwd_kernel")
    )
    return forward != backward


def kernels_of(call: Callable[[], Any], clock: Clock) -> list[Kernel]:
    """What runs in the second of two calls, by falling time, with its share of all."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if clock.is_cuda else [])]
    call()
    clock.synchronize()
    with torch_profile(activities=activities) as profiler:
        call()
        clock.synchronize()
    kernels = [_kernel(event, clock.is_cuda) for event in profiler.key_averages() if _counts(event, clock.is_cuda)]
    total = sum(kernel["us"] for kernel in kernels)
    kernels = [kernel | {"share": kernel["us"] / total} for kernel in kernels if kernel["us"] > 0]
    return sorted(kernels, key=lambda kernel: -kernel["us"])


def _layer_recomputes(kernels: list[Kernel]) -> bool:
    return any(kernel["calls"] > 1 for kernel in kernels if re.search(_WORK[0][0], kernel["kernel"]))


def _counts(event: Any, is_cuda: bool) -> bool:
    is_range = event.key.startswith("Optimizer.step#")  # a mark around other kernels
    return (event.device_type == DeviceType.CUDA or not is_cuda) and not is_range


def _kernel(event: Any, is_cuda: bool) -> Kernel:
    microseconds = event.self_device_time_total if is_cuda else event.self_cpu_time_total
    return {"kernel": event.key, "calls": event.count, "us": float(microseconds)}


def _rates(kernel: Kernel, shape: LayerShape, bytes_a_number: int) -> Kernel:
    calls, microseconds = kernel["calls"], kernel["us"]
    for pattern, set_of_calls, products in _WORK:
        if re.search(pattern, kernel["kernel"]) and calls % set_of_calls == 0:
            return {"tflops": _tflops(products * calls / set_of_calls, shape, microseconds)}
    for pattern, numbers in _TRAFFIC:
        if re.search(pattern, kernel["kernel"]):
            return {"gb_per_second": numbers(shape) * calls * bytes_a_number / microseconds / 1e3}
    return {}


def _tflops(products: float, shape: LayerShape, microseconds: float) -> float:
    flops = 2 * products * shape.num_pairs * shape.hidden_size * shape.expert_size
    return flops / microseconds / 1e6


def _sum(name: str, kernels: list[Kernel], of: list[Kernel]) -> Kernel:
    microseconds, total = (sum(kernel["us"] for kernel in part) for part in (kernels, of))
    calls = sum(kernel["calls"] for kernel in kernels)
    return {"kernel": name, "calls": calls, "us": microseconds, "share": microseconds / total}
