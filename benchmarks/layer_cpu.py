"""One MoE layer on the CPU, forward and backward, against a dense MLP of the same active FLOPs and transformers' block.

All candidates run in turn in one process, so that the ratios hold when the machine's speed drifts. Example:

    python benchmarks/layer_cpu.py --output results/layer_cpu.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remoe import MoE, MoEConfig, Routing
from remoe.bench import machine
from remoe.moe import gates

HIDDEN, FFN, TOKENS = 256, 1024, 4096
TARGETS = (  # row, over, least ratio of speeds
    ("topk E=8", "dense", 0.90),
    ("relu E=8", "topk E=8", 0.95),
    ("topk E=8", "transformers eager E=8", 1.15),
    ("topk E=8", "transformers grouped_mm E=8", 1.15),
    ("topk E=64", "topk E=8", 1 / 1.7),
    ("relu E=64", "relu E=8", 1 / 1.7),
)


class DenseMLP(nn.Module):
    """SwiGLU of the width of one expert: the same active FLOPs as k = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, FFN, bias=False)
        self.up_proj = nn.Linear(HIDDEN, FFN, bias=False)
        self.down_proj = nn.Linear(FFN, HIDDEN, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class ShiftedReLU(nn.Module):
    """A ReLU router with a threshold that leaves exactly k·T pairs on, a different number for each token."""

    def __init__(self, router: nn.Module, hidden_TH: Tensor, top_k: int) -> None:
        super().__init__()
        self.weight = router.weight
        logits = gates.linear_logits(hidden_TH, self.weight).detach().flatten()
        self.threshold = logits.kthvalue(logits.numel() - top_k * hidden_TH.shape[0]).values

    def forward(self, hidden_TH: Tensor, context: object = None) -> Routing:
        logits_TE = gates.linear_logits(hidden_TH, self.weight) - self.threshold
        weights_TE, routing_map_TE = gates.relu(logits_TE)
        return Routing(weights_TE, routing_map_TE, logits_TE)


def ours(router: str, num_experts: int, hidden: Tensor) -> nn.Module:
    config = MoEConfig(hidden_size=HIDDEN, intermediate_size=FFN, num_experts=num_experts, router=router)
    layer = MoE(config)
    if router == "relu":
        layer.router = ShiftedReLU(layer.router, hidden.flatten(0, 1), 1)
    return layer


def transformers_block(implementation: str, num_experts: int) -> nn.Module:
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=num_experts, num_experts_per_tok=1,
        experts_implementation=implementation,
    )  # fmt: skip
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def training_step(layer: nn.Module, hidden: Tensor, grad_out: Tensor) -> Callable[[], None]:
    def step() -> None:
        out = layer(hidden)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(grad_out)
        layer.zero_grad()
        hidden.grad = None

    return step


def measure(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each repeat, candidates in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for name in [*steps, *steps]:
        steps[name]()
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def ratio(times: dict[str, list[float]], row: str, over: str) -> float:
    """Median of the paired ratios of speeds."""
    return statistics.median(b / a for a, b in zip(times[row], times[over], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    hidden, grad_out = torch.randn(1, TOKENS, HIDDEN, requires_grad=True), torch.randn(1, TOKENS, HIDDEN)
    layers = {"dense": DenseMLP()}
    for num_experts in (8, 64):
        for router in ("topk", "relu"):
            layers[f"{router} E={num_experts}"] = ours(router, num_experts, hidden)
    for implementation in ("eager", "grouped_mm"):
        layers[f"transformers {implementation} E=8"] = transformers_block(implementation, 8)
    times = measure({name: training_step(layer, hidden, grad_out) for name, layer in layers.items()}, arguments.repeats)
    report(times, arguments.output)


def report(times: dict[str, list[float]], output: Path | None) -> None:
    print(f"{'forward + backward':28} {'median ms':>10} {'of dense':>9}")
    for name, values in times.items():
        print(f"{name:28} {statistics.median(values):10.1f} {ratio(times, name, 'dense'):9.3f}")
    for row, over, least in TARGETS:
        reached = ratio(times, row, over)
        print(f"{row} / {over}: {reached:.3f} (target {least:.3f}) {'reached' if reached >= least else 'MISSED'}")
    if output:
        shape = {"tokens": TOKENS, "hidden": HIDDEN, "ffn": FFN, "top_k": 1, "dtype": "float32"}
        output.parent.mkdir(parents=True, exist_ok=True)
        rounded = {name: [round(value, 3) for value in values] for name, values in times.items()}
        output.write_text(json.dumps({**machine.describe(), "shape": shape, "milliseconds": rounded}, indent=1) + "\n")


if __name__ == "__main__":
    main()
