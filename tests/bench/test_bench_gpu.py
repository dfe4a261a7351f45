"""Benchmarks on a CUDA device, on small shapes: all peers that are installed, memory, profiles."""

import dataclasses

import pytest
import torch

from remoe.bench import ours
from remoe.bench.clock import Clock
from remoe.bench.layer import LayerBench, bench_layer
from remoe.bench.limits import measure_limits
from remoe.bench.model import ModelBench, bench_model
from remoe.bench.shapes import LayerShape
from tests.bench.test_decode_bench import bench_decode, tiny_bench

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = LayerShape(name="small", num_tokens=1024, hidden_size=256, expert_size=128, num_experts=16, top_k=2)


def small_bench(**changes) -> LayerBench:
    settings = {"shapes": [SMALL], "peers": [], "ours": list(ours.COLUMNS), "device": torch.device("cuda")}
    return LayerBench(**(settings | {"dtype": torch.bfloat16} | changes))


def test_our_columns_and_the_plain_peers_compute_the_layer_and_report_memory():
    results = bench_layer(small_bench(peers=["dense", "grouped_mm", "grouped_mm_compiled", "loop"]))
    results.check()
    assert [row["error"] for row in results.rows if "error" in row] == []
    assert {row["candidate"] for row in results.rows if "note" in row} == {"remoe_chunked"}
    for row in (row for row in results.rows if "note" not in row):
        weight_gradients = 2 * SMALL.num_weights
        assert row["kind"] == "ceiling" or row["peak_bytes"] >= weight_gradients
        assert row["held_bytes"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_our_columns_compute_the_layer_in_other_types(dtype: torch.dtype):
    bench_layer(small_bench(dtype=dtype)).check()


@pytest.mark.parametrize("peer", ["transformers", "transformers_grouped_mm", "scattermoe", "sonicmoe", "liger"])
def test_an_installed_peer_computes_the_layer(peer: str):
    results = bench_layer(small_bench(ours=[], peers=[peer]))
    results.check()
    if "is not installed" in results.rows[0].get("note", ""):
        pytest.skip(results.rows[0]["note"])
    assert [row["error"] for row in results.rows if "error" in row] == []


def test_a_profile_has_the_devices_kernels():
    row = bench_layer(small_bench(profile=True)).rows[0]
    *kernels, everything = row["profile"]
    assert not any(kernel["kernel"].startswith("aten::") for kernel in kernels)
    assert everything["us"] < 1.5e3 * max(row["forward_backward_ms"], 0.1)


def test_the_limits_are_those_of_a_gpu():
    limits = measure_limits(Clock(torch.device("cuda")), torch.bfloat16)
    assert limits.matmul_tflops > 50
    assert limits.copy_gb_per_second > 200


def test_a_model_trains_in_both_phases_with_the_same_loss_as_the_plain_one(run_config):
    config = dataclasses.replace(
        run_config, train=dataclasses.replace(run_config.train, precision="bf16", compile=True)
    )
    results = bench_model(ModelBench(configs={"tiny": config}, peers=[], device=torch.device("cuda"), steps=2))
    wrong = [text for row in results.rows for text in row.get("mismatches", []) if "density" not in text]
    assert wrong == []  # bf16 rounding moves the density of so few tokens
    assert results.rows[0]["peak_bytes"] > 0


def test_text_is_decoded_as_without_a_cache(run_config):
    bench_decode(tiny_bench(run_config, device=torch.device("cuda"))).check()
