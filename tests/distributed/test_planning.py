"""What a layout costs on paper, against numbers worked out by hand."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from remoe.distributed.config import ParallelConfig, resolve_parallel
from remoe.distributed.planning import Job, estimate, estimates, machine
from remoe.distributed.planning.memory import gpu_memory
from remoe.distributed.planning.parts import Parts
from remoe.distributed.planning.routes import rows_sent
from remoe.distributed.planning.step_time import layer_seconds, step_time
from remoe.distributed.planning.traffic import traffic
from remoe.model import ReMoEConfig
from remoe.model.size import parameter_count, plan
from remoe.recipes import read_config
from remoe.training.job import job_of

ROOT = Path(__file__).resolve().parents[2]
SMALL = ReMoEConfig(
    vocab_size=100, hidden_size=8, num_layers=3, num_heads=2, num_kv_heads=1, intermediate_size=16, num_experts=4,
    top_k=1, moe_layers=[1, 2],
)  # fmt: skip


def job(model: ReMoEConfig = SMALL, **settings: object) -> Job:
    values = {"batch_size": 8, "micro_batch_size": 2, "sequence_length": 4} | settings
    return Job(model=model, **values)  # pyright: ignore[reportArgumentType]


def layout(num_gpus: int, **sizes: int | str) -> ParallelConfig:
    return resolve_parallel(ParallelConfig(**sizes), num_gpus)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("recipe", ["remoe-182m-relu", "remoe-469m-dense", "remoe-182m-g8-topk", "remoe-100b-relu"])
def test_parts_add_up_to_the_parameters(recipe: str):
    model = read_config(recipe).model
    parts, moe_layers = Parts.of(model), model.num_moe_layers
    layers = model.num_layers * parts.attention + moe_layers * parts.experts
    assert layers + (model.num_layers - moe_layers) * parts.dense + parts.root == parameter_count(model).total
    assert parts.root >= 2 * model.hidden_size * 51_200  # embedding and head


def test_the_largest_recipe_has_a_hundred_billion_parameters():
    assert parameter_count(read_config("remoe-100b-relu").model).total == pytest.approx(100e9, rel=0.02)


def test_one_gpu_needs_what_the_plan_of_one_device_says():
    alone = job()
    expected = plan(SMALL, alone.workload(layout(1))).memory
    found = gpu_memory(alone, layout(1))
    assert (found.total, found.total_at_start) == (expected.total, expected.total_at_start)


def test_the_state_is_shared_by_the_ranks_of_a_copy():
    total = parameter_count(SMALL).total
    assert gpu_memory(job(), layout(4)).state == 16 * total // 4
    assert gpu_memory(job(), layout(4, data_replicate=2)).state == 16 * total // 2
    assert gpu_memory(job(), layout(4, expert=2, context=2)).state == 16 * total // 4


def test_gathered_at_once_are_the_root_and_the_two_largest_units():
    parts = Parts.of(SMALL)
    assert (parts.experts, parts.attention, parts.dense) == (1536, 192, 384)
    root = 8 * parts.root
    assert gpu_memory(job(), layout(2)).gathered == root + 2 * (1536 + 1536) + 2 * 1536 + (2 + 4) * 1536
    half = gpu_memory(job(), layout(2, expert=2)).gathered
    assert half == root + 2 * (768 + 768) + 2 * 768 + (2 + 4) * 768
    kept = gpu_memory(job(parallel=ParallelConfig(reshard=False)), dataclasses.replace(layout(2), reshard=False))
    assert kept.gathered == root + 2 * (2 * 1536 + 384 + 3 * 192) + (2 + 4) * 1536


def test_ranks_that_share_the_optimizer_hold_the_rest_whole():
    total, root = parameter_count(SMALL).total, Parts.of(SMALL).root
    found = gpu_memory(job(), layout(4, sharded="optimizer"))
    assert found.state == 12 * total // 4
    assert found.gathered == 2 * (total - root) + 4 * root + 4 * total
    experts = 2 * 1536
    own = gpu_memory(job(), layout(4, sharded="optimizer", expert=2))
    assert own.gathered == found.gathered - (2 + 4) * experts // 2


def test_rows_on_their_way_stay_within_the_budget():
    """4 ranks, half of 4 experts open at the start: 2 rows a token, 4 times 8 numbers of 2 bytes, 2 x 4 tokens."""

    def at_start(budget: float) -> int:
        parallel = dataclasses.replace(layout(4, expert=4), expert_rows=budget)
        alone = gpu_memory(job(), layout(1)).activations_at_start
        return gpu_memory(job(), parallel).activations_at_start - alone

    assert at_start(2.0) == 8 * 2 * 4 * 8 * 2
    assert at_start(1.5) == 8 * 1.5 * 4 * 8 * 2


@pytest.mark.parametrize(
    ("active", "ranks", "rows"), [(1, 2, 1.0), (4, 2, 2.0), (2, 2, 5 / 3), (2, 4, 2.0), (0, 2, 0.0)]
)
def test_a_token_is_sent_once_to_each_rank_of_its_experts(active: int, ranks: int, rows: float):
    assert rows_sent(job(), layout(4, expert=ranks), active) == pytest.approx(rows)


def test_rows_sent_are_those_of_experts_drawn_at_random():
    draw = random.Random(0)
    wide = job(dataclasses.replace(SMALL, num_experts=16, top_k=3))
    ranks_of = [len({expert // 4 for expert in draw.sample(range(16), 3)}) for _ in range(20_000)]
    assert rows_sent(wide, layout(4, expert=4), 3) == pytest.approx(sum(ranks_of) / 20_000, rel=0.01)


def test_rows_go_to_their_experts_and_back_forward_and_backward():
    """2 layers; 2 x 4 tokens, one row each; 4 times 8 numbers of 2 bytes, and 2 experts' map and gates both ways."""
    sent = traffic(job(), layout(2, expert=2)).all_to_all
    assert sent == 2 * 8 * (4 * 2 * 8 + 2 * (1 + 8)) / 2
    again = traffic(job(activation_checkpointing="full"), layout(2, expert=2)).all_to_all
    assert again == 2 * 8 * (6 * 2 * 8 + 2 * (1 + 8)) / 2
    assert traffic(job(), layout(2)).all_to_all == 0


def test_parameters_are_gathered_twice_in_bf16_and_gradients_reduced_in_fp32():
    parts = Parts.of(SMALL)
    units = 2 * 1536 + 384 + 3 * 192
    assert traffic(job(), layout(4)).gathers == 3 / 4 * (8 * units + 8 * parts.root)
    halved = dataclasses.replace(layout(4), reshard=False, reduce="bf16")
    assert traffic(job(parallel=halved), halved).gathers == 3 / 4 * (4 * units + 8 * parts.root)
    shared = traffic(job(), layout(4, expert=4)).gathers  # each expert has one rank: nothing of it is gathered
    assert shared == 3 / 4 * (8 * (384 + 3 * 192) + 8 * parts.root)


def test_ranks_that_share_the_optimizer_gather_and_reduce_once_a_step():
    parts, units = Parts.of(SMALL), 2 * 1536 + 384 + 3 * 192
    whole = layout(4, sharded="optimizer")
    in_step = 3 / 4 * ((2 + 4) * units + 8 * parts.root)
    assert traffic(job(), whole).gathers == pytest.approx(in_step / job().num_micro_batches(whole))
    seconds = step_time(job(), whole, machine())
    assert seconds.gathers == pytest.approx(in_step / machine()["host_link"]), "nothing hides it"


def test_copies_sum_their_shards():
    total = parameter_count(SMALL).total
    assert traffic(job(), layout(4, data_replicate=2)).replicas == 2 * 0.5 * 4 * total / 2
    assert traffic(job(), layout(4)).replicas == 0


def test_a_host_shares_its_links_and_beyond_it_each_gpu_has_its_own():
    gpus = machine()
    host, network = gpus["host_link"], gpus["network_link"]
    assert gpus["gpus_per_host"] == 8
    assert gpus.gather_seconds(1e9, 8) == 1e9 / host
    assert gpus.gather_seconds(1e9, 16) == 1e9 / min(host, 8 * network)
    assert gpus.gather_seconds(1e9, 4, stride=8) == 1e9 / network, "one GPU a host"
    assert gpus.exchange_seconds(1e9, 8) == 1e9 / host
    assert gpus.exchange_seconds(1e9, 16) == pytest.approx(1e9 * 8 / 15 / network)
    assert gpus.gather_seconds(1e9, 1) == gpus.exchange_seconds(1e9, 1) == 0


def test_a_step_is_the_sum_of_its_parts_and_micro_batches_are_counted():
    gpus, whole = machine(), job(batch_size=32)
    seconds = step_time(whole, layout(2, expert=2), gpus)
    assert seconds.total == seconds.compute + seconds.exchanges + seconds.gathers + seconds.optimizer
    assert seconds.exchanges > 0
    more = step_time(job(batch_size=64), layout(2, expert=2), gpus)
    assert more.compute == pytest.approx(2 * seconds.compute)
    assert more.optimizer == seconds.optimizer


def test_small_layers_wait_for_the_host_unless_steps_are_launched_as_a_whole():
    gpus = machine()
    floors = SMALL.num_layers * gpus["attention_host"] + 2 * gpus["expert_host"] + gpus["dense_host"]
    assert step_time(job(batch_size=2), layout(1), gpus).compute == pytest.approx(floors, rel=0.01)
    assert step_time(job(batch_size=2, is_compiled=True), layout(1), gpus).compute < floors / 100


def test_at_the_start_half_of_all_experts_work_and_rows_above_the_cap_are_computed_again():
    gpus = machine()
    wide = job(dataclasses.replace(SMALL, hidden_size=512, intermediate_size=2048, num_experts=8), is_compiled=True)
    wide = dataclasses.replace(wide, sequence_length=4096)
    steady, start = step_time(wide, layout(1), gpus), step_time(wide, layout(1), gpus, at_start=True)
    sizes = (512, 2048, 8)
    one, four = (layer_seconds(2 * 4096, (*sizes, active), gpus) for active in (1, 4))
    num_rows, kept, num_chunks = 32768, 12288, 2  # 3/4 of 16384 rows are kept, and the others come at once
    again = 2 / 9 * (1 - kept / num_rows)
    of_tokens, of_matrices = 2 * 2 * 4096 * 512, 3 * 8 * 512 * 2048
    sums = 4 * (2 * (num_chunks - 1) * of_tokens + 2 * num_chunks * of_matrices) / gpus["memory_rate"]
    assert start.compute - steady.compute == pytest.approx(4 * 2 * ((1 + again) * four + sums - one))
    topk = dataclasses.replace(wide, model=dataclasses.replace(wide.model, router="topk"))
    assert step_time(topk, layout(1), gpus, at_start=True) == step_time(topk, layout(1), gpus)


def test_all_layouts_that_model_and_batch_allow_are_found_the_fastest_that_fit_first():
    found = estimates(job(), 4, machine())
    sizes = {
        (one.parallel.data_replicate, one.parallel.shards, one.parallel.expert, one.parallel.pipeline) for one in found
    }
    pipelines = {(*sizes, 2) for sizes in ((1, 2, 1), (1, 2, 2), (2, 1, 1))}  # 3 layers: no more than 3 stages
    assert sizes == {(1, 4, 1, 1), (1, 4, 2, 1), (1, 4, 4, 1), (2, 2, 1, 1), (2, 2, 2, 1), (4, 1, 1, 1)} | pipelines
    assert {one.parallel.sequence_ranks for one in found} == {1}, "one key/value head"
    assert all(one.fits for one in found)
    assert [one.step_seconds.total for one in found] == sorted(one.step_seconds.total for one in found)
    assert all(one.tokens_per_second == 32 / one.step_seconds.total for one in found)
    assert job(batch_size=6).layout(4) is None, "4 ranks cannot share 6 sequences"
    assert job(batch_size=1).layout(2, pipeline=2) is None, "one sequence is no micro-batch for each of 2 stages"


def test_a_model_that_no_gpu_can_hold_fits_on_many():
    large = job_of(read_config("remoe-100b-relu"))
    alone = estimate(large, large.layout(1) or layout(1), machine())
    assert not alone.fits
    assert estimate(large, large.layout(1024, expert=64) or layout(1), machine()).fits


def test_the_micro_batch_is_the_largest_that_divides_a_rank_s_share():
    assert job(batch_size=12, micro_batch_size=4).micro_batch(layout(2)) == 3


def test_measured_layers_are_met_within_fifteen_percent():
    layer = json.loads((ROOT / "results" / "gpu" / "layer.json").read_text())
    if layer["gpus"][0] != machine().name:
        pytest.skip(f"layers were measured on another card than the constants: {layer['gpus'][0]}")
    rows = [row for row in layer["rows"] if (row.get("candidate"), row.get("route")) == ("remoe_graph", "var")]
    rows = [row for row in rows if row.get("forward_backward_ms")]
    assert rows
    for row in rows:
        tokens, hidden, ffn, experts, active = row["sizes"]
        predicted = 1e3 * layer_seconds(tokens, (hidden, ffn, experts, active), machine())
        assert predicted == pytest.approx(row["forward_backward_ms"], rel=0.15), row["shape"]


def test_every_constant_says_where_it_comes_from():
    for key, constant in machine().constants.items():
        assert constant.value > 0, key
        assert constant.unit, key
        assert constant.is_assumed or constant.source.startswith("results/gpu/"), key
    assert 0 < len(machine().assumptions) < len(machine().constants)


def test_the_constants_are_those_that_the_results_give():
    folder = ROOT / "results" / "gpu"
    cards = {path.name: json.loads(path.read_text())["gpus"][0] for path in (folder.glob("model*.json"))}
    cards["layer.json"] = json.loads((folder / "layer.json").read_text())["gpus"][0]
    if len(cards) < 2 or set(cards.values()) != {machine().name}:
        pytest.skip(f"the results here are not all of the constants' card, {machine().name}: {cards}")
    tool = ROOT / "benchmarks" / "plan_constants.py"
    done = subprocess.run([sys.executable, str(tool), "--check"], check=False)
    assert done.returncode == 0, "run python benchmarks/plan_constants.py"
