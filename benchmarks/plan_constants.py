"""Write the constants that `remoe plan --gpus` uses, from what was measured; what was not is assumed, and says so.

    python benchmarks/plan_constants.py [--check]

`--check` writes nothing and exits with 1 where the file is not what the results give.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from measured import measured_models
from remoe.distributed.planning.machine import machine_of
from remoe.distributed.planning.step_time import step_time

ROOT = Path(__file__).resolve().parents[1]
MODELS = "results/gpu/model*.json"
TARGET = ROOT / "src" / "remoe" / "distributed" / "planning" / "machine.json"
LAYER = "results/gpu/layer.json"
LINKS = "results/gpu/scale_out_469m_dp_relu.json"
DEVICE_TIME, HOST_TIME = "remoe_graph", "remoe_capacity"
"""The same kernels replayed as a graph, and launched one by one: the second takes at least what the host takes."""
MEMORY = {"H100": 79 * 2**30, "H200": 139 * 2**30}
ASSUMED: dict[str, tuple[float, str, str]] = {
    "memory_set_aside": (4e9, "bytes", "CUDA context, NCCL buffers and fragments"),
    "gpus_per_host": (8, "GPUs", "the usual host of such GPUs"),
    "network_link": (40e9, "bytes/s", "a GPU's share of the network: 400 Gbit/s at 80 %"),
    "attention_products": (400e12, "FLOP/s", "a flash attention kernel, forward and backward"),
    "fp32_products": (40e12, "FLOP/s", "routers, in fp32 without tensor cores"),
    "logit_passes": (6, "passes over the logits", "the loss, in chunks, forward and backward"),
    "eager_block_passes": (
        494,
        "passes over a layer's hidden states",
        "as eager steps of 2026-11-28 had it, with slower experts",
    ),
    "attention_host": (2.0e-3, "s", "launches of one attention block, forward and backward"),
    "dense_host": (1.0e-3, "s", "launches of one dense MLP, forward and backward"),
    "expert_imbalance": (1.1, "busiest rank over the mean", "loads of experts under a load-balancing loss"),
    "exchange_wait": (0.3e-3, "s", "the host waits for split sizes, once a layer and pass"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    written = json.dumps(constants(json.loads((ROOT / LAYER).read_text())), indent=1) + "\n"
    if parser.parse_args().check:
        return int(TARGET.read_text() != written)
    TARGET.write_text(written)
    return 0


def constants(layer: dict[str, Any]) -> dict[str, Any]:
    """The file's content."""
    measured: dict[str, tuple[float, str, str]] = {
        "products": (1e12 * layer["limits"]["matmul_tflops"], "FLOP/s", "limits.matmul_tflops"),
        "memory_rate": (1e9 * layer["limits"]["copy_gb_per_second"], "bytes/s", "limits.copy_gb_per_second"),
        **fitted(layer),
    }
    entries = {key: entry(*value, f"{LAYER}: ") for key, value in measured.items()}
    entries["host_link"] = entry(*host_link(), f"{LINKS}: ")
    memory = next(size for word, size in MEMORY.items() if word in layer["gpus"][0])
    entries["memory"] = entry(memory, "bytes", "what torch reports of this card", "assumed: ")
    entries |= {key: entry(*value, "assumed: ") for key, value in ASSUMED.items()}
    values = {"name": layer["gpus"][0], "constants": entries}
    entries["block_passes"] = entry(*block_passes(values), f"{MODELS}: ")
    return values


def host_link() -> tuple[float, str, str]:
    """What leaves a GPU in a second, each way."""
    about = json.loads((ROOT / LINKS).read_text())["machine"]
    rates = about["links_gb_per_second"]
    num, names = len(about["gpus"]), ", ".join(rates)
    return 1e9 * statistics.median(rates.values()), "bytes/s", f"median of {names} between {num} GPUs of a host"


def block_passes(values: dict[str, Any]) -> tuple[float, str, str]:
    """Passes over the hidden states in a block's attention, norms and residuals: what compiled models take beyond the
    products and the other passes; the mean over models.
    """
    nothing = {"block_passes": entry(0, "", "", "")}
    gpus = machine_of({"name": values["name"], "constants": {**values["constants"], **nothing}})
    found, dates = [], set[str]()
    for row in measured_models(ROOT / "results"):
        if row.gpu == gpus.name and row.is_for_fit:
            job = row.job
            seconds = step_time(job, row.parallel, gpus).total
            a_pass = job.tokens * job.model.hidden_size * job.compute_bytes * job.model.num_layers
            found.append((job.tokens / row.tokens_per_second - seconds) * gpus["memory_rate"] / a_pass)
            dates.add(row.date)
    if not found:
        raise SystemExit(f"no steady {MODELS} was measured on {gpus.name}, as {LAYER} was; run: remoe bench model")
    what = f"what step_ms of our steady candidates of {', '.join(sorted(dates))} leaves beyond the other terms"
    return statistics.mean(found), "passes over a layer's hidden states", what


def entry(value: float, unit: str, source: str, kind: str) -> dict[str, Any]:
    return {"value": float(f"{value:.4g}"), "unit": unit, "source": kind + source}


def fitted(layer: dict[str, Any]) -> dict[str, tuple[float, str, str]]:
    """Rate of the experts' products, and passes over their rows: the least squares of relative errors.

    As planning/step_time.py's `layer_seconds` has it: seconds = products / rate + passes * row bytes / memory rate +
    weight bytes / memory rate.
    """
    memory_rate = 1e9 * layer["limits"]["copy_gb_per_second"]
    normal, right = [[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]
    for (tokens, hidden, ffn, experts, active), seconds in layer_times(layer, DEVICE_TIME):
        columns = (18 * tokens * active * hidden * ffn, 2 * tokens * active * (hidden + ffn) / memory_rate)
        target = seconds - 18 * experts * hidden * ffn / memory_rate
        for i in (0, 1):
            right[i] += columns[i] * target / seconds**2
            for j in (0, 1):
                normal[i][j] += columns[i] * columns[j] / seconds**2
    determinant = normal[0][0] * normal[1][1] - normal[0][1] * normal[1][0]
    per_flop = (right[0] * normal[1][1] - right[1] * normal[0][1]) / determinant
    passes = (normal[0][0] * right[1] - normal[1][0] * right[0]) / determinant
    fit = f"fitted to forward_backward_ms of {DEVICE_TIME}"
    host = min(seconds for _, seconds in layer_times(layer, HOST_TIME))
    return {
        "expert_products": (1 / per_flop, "FLOP/s", fit),
        "expert_row_passes": (passes, "passes over a row's hidden and inner values", fit),
        "expert_host": (host, "s", f"least forward_backward_ms of {HOST_TIME}: the host launches no faster"),
    }


def layer_times(layer: dict[str, Any], candidate: str) -> list[tuple[list[int], float]]:
    """(tokens, hidden, ffn, experts, k) and seconds of each measured shape, with variable counts where measured."""
    times = {}
    for route in ("topk", "var"):
        for row in layer["rows"]:
            if (row.get("route"), row.get("candidate")) == (route, candidate) and row.get("forward_backward_ms"):
                times[row["shape"]] = (row["sizes"], row["forward_backward_ms"] / 1e3)
    return list(times.values())


if __name__ == "__main__":
    sys.exit(main())
