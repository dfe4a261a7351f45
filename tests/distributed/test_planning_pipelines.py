"""What a pipeline costs on paper, against numbers worked out by hand."""

import dataclasses

import pytest
import torch

from remoe.distributed.config import ParallelConfig, resolve_parallel
from remoe.distributed.planning import Job, estimate, estimates, machine
from remoe.distributed.planning.memory import gpu_memory
from remoe.distributed.planning.step_time import step_time
from remoe.distributed.planning.traffic import traffic
from remoe.model import ReMoEConfig, ReMoEForCausalLM
from remoe.model.part import keep_part, layers_of_part
from remoe.model.size import Workload, plan
from remoe.recipes import read_config
from remoe.training.job import job_of

SMALL = ReMoEConfig(
    vocab_size=100, hidden_size=8, num_layers=4, num_heads=2, num_kv_heads=1, intermediate_size=16, num_experts=4,
)  # fmt: skip
EXPERTS, ATTENTION = 4 * 3 * 8 * 16, 2 * 8 * 4 * (2 + 1)
"""Parameters of one layer's experts and attention."""
ROUTER_AND_NORMS = 4 * 8 + 2 * 8
LAYER = EXPERTS + ATTENTION + ROUTER_AND_NORMS
VOCABULARY = 100 * 8


def job(model: ReMoEConfig = SMALL, **settings: object) -> Job:
    """8 sequences of 4 tokens, one at a time."""
    values = {"batch_size": 8, "micro_batch_size": 1, "sequence_length": 4} | settings
    return Job(model=model, **values)  # pyright: ignore[reportArgumentType]


def layout(num_gpus: int, **sizes: int) -> ParallelConfig:
    return resolve_parallel(ParallelConfig(**sizes), num_gpus)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("router", ["relu", {"name": "recurrent_relu", "state_size": 4}])
def test_the_parameters_of_stages_are_those_that_they_keep_of_a_model(tied: bool, router: object):
    model = dataclasses.replace(SMALL, num_layers=5, moe_layers=[0, 2, 4], tie_embeddings=tied, router=router)
    counted = {}
    for stage in job(model).stages(3):
        with torch.device("meta"):
            part = ReMoEForCausalLM(model)
        keep_part(part, layers_of_part(5, 3, stage.first))
        counted[stage.first] = sum(parameter.numel() for parameter in part.parameters())
        assert stage.job.parts.total == counted[stage.first], stage.first
    assert len(counted) == 3, "first, middle, last"


def test_a_stage_of_the_character_model_leaves_the_head_and_its_bias_to_the_last():
    model = ReMoEConfig(vocab_size=100, num_layers=2, num_kv_heads=None, block="post_norm", router="rmoe")
    for stage in job(model).stages(2):
        with torch.device("meta"):
            part = ReMoEForCausalLM(model)
        keep_part(part, layers_of_part(2, 2, stage.first))
        assert stage.job.parts.total == sum(parameter.numel() for parameter in part.parameters())


def test_stages_that_cost_the_same_are_counted_together():
    stages = job(dataclasses.replace(SMALL, num_layers=10)).stages(4)
    assert [(stage.first, stage.num_alike, stage.job.model.num_layers) for stage in stages] == [
        (0, 1, 3), (1, 1, 3), (2, 1, 2), (3, 1, 2),
    ]  # fmt: skip
    stages = job(dataclasses.replace(SMALL, num_layers=32)).stages(8)
    assert [(stage.first, stage.num_alike) for stage in stages] == [(0, 1), (1, 6), (7, 1)]


def test_stages_hold_their_own_layers_only():
    """2 stages of 2 layers, each by 2 ranks: the first has the embedding, the last norm and head."""
    first, last = 2 * LAYER + VOCABULARY, 2 * LAYER + 8 + VOCABULARY
    assert [stage.job.parts.total for stage in job().stages(2)] == [first, last]
    found = [gpu_memory(job(), layout(4, pipeline=2)).state, gpu_memory(job(), layout(2, pipeline=2)).state]
    assert found in ([16 * first // 2, 16 * first], [16 * last // 2, 16 * last])


def test_what_a_stage_gathers_stays_with_the_sums_of_its_gradients():
    """2 bytes a parameter and 4 a gradient, and once more the largest unit as it arrives; the root both in fp32."""
    units = 2 * (EXPERTS + ATTENTION)
    roots = [2 * ROUTER_AND_NORMS + VOCABULARY + norm for norm in (0, 8)]
    found = gpu_memory(job(), layout(4, pipeline=2)).gathered
    assert found in [8 * root + (2 + 4) * units + 2 * EXPERTS for root in roots]
    halved = dataclasses.replace(layout(4, pipeline=2, expert=2), reduce="bf16")
    units = 2 * (EXPERTS // 2 + ATTENTION)
    assert gpu_memory(job(), halved).gathered in [8 * root + (2 + 2) * units + EXPERTS for root in roots]


def test_the_first_stage_keeps_as_many_micro_batches_as_there_are_stages():
    """1F1B: 2 micro-batches through its 2 layers keep what one keeps through 4; it has no head."""
    headless = dataclasses.replace(SMALL, vocab_size=1, moe_layers=[0, 1, 2, 3])
    kept = plan(headless, Workload(sequence_length=4, micro_batch_size=1, precision="bf16")).memory
    first, last = job().stages(2)
    found = gpu_memory(job(), layout(2, pipeline=2))
    one = plan(last.job.model, Workload(sequence_length=4, micro_batch_size=1, precision="bf16")).memory
    assert found.activations in (kept.activations, one.activations)
    larger = job(dataclasses.replace(SMALL, hidden_size=64, vocab_size=2), sequence_length=64)
    of_first = gpu_memory(larger, layout(2, pipeline=2)).activations
    of_last = larger.stages(2)[1].job.memory(larger.workload(layout(2, pipeline=2)), 1).activations
    assert 1.7 < of_first / of_last < 2.1, "without a large head the first stage needs most"
    assert first.job.has_embedding
    assert not first.job.has_head


def test_buffers_of_what_stages_send_are_one_for_each_micro_batch_and_direction():
    """4 tokens of 8 numbers and the loss, in fp32: 33 numbers, 8 micro-batches; a stage between two has twice that."""
    assert gpu_memory(job(), layout(2, pipeline=2)).received == 8 * 4 * 33
    middle = job(dataclasses.replace(SMALL, vocab_size=2))
    assert gpu_memory(middle, layout(4, pipeline=4)).received in (8 * 4 * 33, 2 * 8 * 4 * 33)
    assert gpu_memory(job(), layout(2)).received == 0


def test_hidden_states_router_states_and_the_loss_travel_both_ways():
    """A stage between two others sends hidden states on and gradients back, each 4 tokens of 8 numbers in fp32."""
    assert traffic(job(), layout(2, pipeline=2)).stages == 4 * (4 * 8 + 1)
    assert traffic(job(), layout(4, pipeline=4)).stages == 2 * 4 * (4 * 8 + 1)
    recurrent = dataclasses.replace(SMALL, router={"name": "recurrent_relu", "state_size": 6}, moe_layers=[0])
    assert traffic(job(recurrent), layout(4, pipeline=4)).stages == 2 * 4 * (4 * (8 + 6) + 1), "through dense ones too"
    assert traffic(job(), layout(2, pipeline=2, data_shard=1)).stages == 4 * (4 * 8 + 1)
    assert traffic(job(), layout(4, pipeline=2, context=2)).stages == 4 * (2 * 8 + 1), "half of the tokens"
    assert traffic(job(), layout(4)).stages == 0


def test_a_stage_gathers_once_a_micro_batch_and_reduces_once_a_step():
    """2 ranks a stage, 4 micro-batches each: layers are gathered 5 times in bf16, reduced once in fp32."""
    units, root = 2 * (EXPERTS + ATTENTION), 2 * ROUTER_AND_NORMS + VOCABULARY + 8
    found = traffic(job(), layout(4, pipeline=2)).gathers
    assert found == pytest.approx(((2 * 5 + 4) * units + 8 * root) / 2 / 4)
    kept = dataclasses.replace(layout(4, pipeline=2), reshard=False)
    assert traffic(job(), kept).gathers == pytest.approx(((2 * 1 + 4) * units + 8 * root) / 2 / 4)


def test_copies_sum_the_shards_of_their_stage_once_a_step():
    largest = 2 * LAYER + 8 + VOCABULARY
    found = traffic(job(), layout(4, pipeline=2, data_replicate=2)).replicas
    assert found == pytest.approx(2 * 0.5 * 4 * largest / 4)


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 8), (4, 8), (4, 4)])
def test_of_m_micro_batches_and_p_stages_each_waits_p_minus_1_of_m_plus_p_minus_1_times(
    stages: int, micro_batches: int
):  # fmt: skip
    """Stages of equal layers, where what is at the ends costs nothing: a vocabulary of one token."""
    even = job(dataclasses.replace(SMALL, vocab_size=1), batch_size=micro_batches)
    found = step_time(even, layout(stages, pipeline=stages), machine())
    work = found.total - found.optimizer
    assert found.bubble / work == pytest.approx((stages - 1) / (micro_batches + stages - 1), rel=1e-3)


def test_uneven_stages_go_at_the_pace_of_the_slowest():
    """3 layers by 2 stages, so small that a layer takes what the host takes to launch it, a each; 8 micro-batches:
    the first has 2a, the last a; the first micro-batch takes 3a, and the 7 others 2a each.
    """
    gpus = machine()
    a = gpus["attention_host"] + gpus["expert_host"]
    found = step_time(job(dataclasses.replace(SMALL, num_layers=3)), layout(2, pipeline=2), gpus)
    assert found.compute == pytest.approx(8 * 2 * a, rel=0.01)
    assert found.bubble == pytest.approx(a, rel=0.01)
    assert found.total == pytest.approx(3 * a + 7 * 2 * a, rel=0.01)


@pytest.mark.parametrize("num_layers", [4, 6, 7, 9, 11])
@pytest.mark.parametrize("micro_batches", [4, 8, 16])
def test_a_step_takes_no_longer_than_planned_and_as_long_where_stages_are_even(num_layers: int, micro_batches: int):
    """Beside the passes of 1F1B played through, each begun as soon as it can be; a layer takes what the host takes, a
    third of it for the forward pass. Uneven stages gain at most what the fastest is ahead, in each other stage.
    """
    gpus = machine()
    layers = [len(layers_of_part(num_layers, 4, stage)) for stage in range(4)]
    model = dataclasses.replace(SMALL, num_layers=num_layers)
    found = step_time(job(model, batch_size=micro_batches), layout(4, pipeline=4), gpus)
    a_layer = gpus["attention_host"] + gpus["expert_host"]
    played = makespan([float(size) for size in layers], micro_batches)
    planned = (found.total - found.optimizer) / a_layer
    gain = 3 * (max(layers) - min(layers))
    assert 0.99 * played < planned < 1.01 * (played + gain)


def makespan(seconds: list[float], micro_batches: int) -> float:
    """When the last pass ends, of stages that take so long for both passes of a micro-batch."""
    ends: dict[tuple[str, int, int], float] = {}
    queues = [one_forward_one_backward(len(seconds) - 1 - stage, micro_batches) for stage in range(len(seconds))]
    clocks = [0.0] * len(seconds)
    while any(queues):
        for stage, queue in enumerate(queues):
            while queue:
                kind, number = queue[0]
                before = stage - 1 if kind == "forward" else stage + 1
                is_end = before in (-1, len(seconds))
                if not is_end and (kind, number, before) not in ends:
                    break
                start = max(clocks[stage], 0.0 if is_end else ends[kind, number, before])
                clocks[stage] = start + seconds[stage] * (1 / 3 if kind == "forward" else 2 / 3)
                ends[kind, number, stage] = clocks[stage]
                queue.pop(0)
    return max(clocks)


def one_forward_one_backward(warm_up: int, micro_batches: int) -> list[tuple[str, int]]:
    """A stage's passes in their order."""
    ahead = min(warm_up, micro_batches)
    passes = [("forward", number) for number in range(ahead)]
    for number in range(ahead, micro_batches):
        passes += [("forward", number), ("backward", number - ahead)]
    return passes + [("backward", number) for number in range(micro_batches - ahead, micro_batches)]


def test_stages_pass_on_over_the_slowest_link_between_them():
    gpus = machine()
    host, network = gpus["host_link"], gpus["network_link"]
    assert gpus.pass_seconds(1e9, 1, 8) == 0
    assert gpus.pass_seconds(1e9, 8, 1) == gpus.pass_seconds(1e9, 2, 4) == 1e9 / host, "a host of 8"
    assert gpus.pass_seconds(1e9, 2, 8) == gpus.pass_seconds(1e9, 4, 4) == 1e9 / network


@pytest.mark.parametrize(("stages", "neighbours"), [(2, 1), (3, 2), (4, 2)])
def test_a_stage_waits_for_each_of_its_neighbours_and_the_first_micro_batch_for_all_hops(stages: int, neighbours: int):
    """Links so slow that nothing else counts: 33 numbers of 4 bytes a hop, there and back."""
    gpus = machine()
    slow = dataclasses.replace(gpus.constants["host_link"], value=1.0)
    slow_gpus = dataclasses.replace(gpus, constants=gpus.constants | {"host_link": slow})
    found = step_time(job(), layout(stages, pipeline=stages), slow_gpus)
    assert found.exchanges == pytest.approx(8 * neighbours * 4 * 33, rel=0.01)
    hops = 2 * (stages - 1)
    assert found.total == pytest.approx((hops + 7 * neighbours) * 4 * 33, rel=0.01), "the first one, and 7 others"


def test_what_is_reduced_at_the_end_of_a_step_is_waited_for_once():
    """All else of a large stage hides its gathers: only 4 bytes a parameter of one stage are left, over a host's links.

    Its 4 ranks pass 3/4 of them on; that the other stage waits a micro-batch long has nothing to do with it.
    """
    gpus = machine()
    wide = dataclasses.replace(SMALL, hidden_size=512, intermediate_size=2048, vocab_size=1)
    large = job(wide, batch_size=32, sequence_length=4096, is_compiled=True)
    split, num_parameters = layout(8, pipeline=2), large.stages(2)[0].job.parts.total
    found = step_time(large, split, gpus)
    assert found.gathers == pytest.approx(3 / 4 * 4 * num_parameters / gpus["host_link"], rel=0.01)
    assert found.bubble == pytest.approx((found.compute + found.exchanges) / large.num_micro_batches(split), rel=1e-4)


def test_a_micro_batch_is_small_enough_for_all_stages_to_have_one():
    eight = job(micro_batch_size=8)
    assert [eight.micro_batch(layout(size, pipeline=size)) for size in (1, 2, 4)] == [8, 4, 2]
    assert job(batch_size=6, micro_batch_size=6).micro_batch(layout(4, pipeline=4)) == 1, "of 6, 1 is left"


def test_pipelines_come_first_between_hosts_that_a_slow_network_joins():
    """Two hosts, 1 Gbit/s a GPU: gradients cross the network in every other layout, in this one hidden states."""
    gpus = machine()
    slow = dataclasses.replace(gpus.constants["network_link"], value=1.25e8)
    slow_gpus = dataclasses.replace(gpus, constants=gpus.constants | {"network_link": slow})
    small = job_of(read_config("remoe-182m-relu", ["model.vocab_size=50257"]))
    assert estimates(small, 16, gpus)[0].parallel.pipeline == 1
    best = estimates(small, 16, slow_gpus)[0]
    assert best.parallel.pipeline == 2, "one stage a host"


@pytest.mark.parametrize(("sequences", "wins"), [(2048, False), (8192, True)])
def test_a_hundred_billion_parameters_gain_by_stages_if_a_batch_fills_them(sequences: int, wins: bool):
    """On 1,024 GPUs: with 2 sequences each, 4 stages idle for a fifth of the step; with 8 it pays that all experts of
    a layer then fit into a host.
    """
    large = job_of(read_config("remoe-100b-relu", [f"train.batch_size={sequences}"]))
    sizes = [{"expert": expert} for expert in (8, 16, 32, 64)]
    alone = min(seconds(large, layout) for layout in sizes)
    staged = seconds(large, {"pipeline": 4, "expert": 8, "data_replicate": 8})
    assert (staged < 0.95 * alone) if wins else (alone < 0.95 * staged)


@pytest.mark.slow
def test_the_search_finds_the_stages_of_a_hundred_billion_parameters():
    best = estimates(job_of(read_config("remoe-100b-relu", ["train.batch_size=8192"])), 1024, machine())[0]
    assert best.fits
    assert (best.parallel.pipeline, best.parallel.expert) == (4, 8)


def seconds(large: Job, sizes: dict[str, int]) -> float:
    """Of a step on 1,024 GPUs, which must be able to hold it."""
    parallel = large.layout(1024, **sizes)
    assert parallel is not None
    found = estimate(large, parallel, machine())
    assert found.fits
    return found.step_seconds.total
