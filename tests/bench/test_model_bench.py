"""Benchmarks of whole models, on a tiny one."""

import dataclasses
import math

import pytest
import torch

from remoe.bench import model as model_bench
from remoe.bench import steady
from remoe.bench.arms import OurArm, stepper_of, twin_stepper
from remoe.bench.fresh import fresh_model, random_batch, twin_with_router
from remoe.bench.limits import Limits, TextLimits
from remoe.bench.model import ModelBench, bench_model
from remoe.bench.results import MismatchError
from remoe.bench.tables import console, model_table, ratio_lines
from remoe.errors import ConfigError
from remoe.model import ReMoEConfig, ReMoEForCausalLM
from remoe.model.size import parameter_count
from remoe.training.config import TrainConfig

CPU = torch.device("cpu")


@pytest.fixture
def model(run_config: TrainConfig) -> ReMoEForCausalLM:
    torch.manual_seed(0)
    return fresh_model(run_config.model, CPU)


def densities(model: ReMoEForCausalLM, tokens_BS: torch.Tensor) -> list[float]:
    with torch.no_grad():
        routings = model(tokens_BS).routings
    return [float(routing.routing_map_TE.float().mean()) for routing in routings if routing is not None]


def test_a_fresh_relu_model_has_half_of_its_gates_open_and_a_settled_one_k_of_e(model, run_config):
    tokens_BS = random_batch(run_config.model, 16, 64, seed=0).tokens_BS
    assert densities(model, tokens_BS) == pytest.approx([0.5, 0.5], abs=0.15)
    steady.share_a_direction(model)
    steady.settle(model, tokens_BS)
    assert densities(model, tokens_BS) == pytest.approx([0.25, 0.25], abs=0.002)
    other_BS = random_batch(run_config.model, 16, 64, seed=1).tokens_BS
    assert densities(model, other_BS) == pytest.approx([0.25, 0.25], abs=0.04)


def test_a_settled_relu_model_gives_each_expert_its_share_and_tokens_different_numbers(model, run_config):
    tokens_BS = random_batch(run_config.model, 16, 64, seed=0).tokens_BS
    steady.share_a_direction(model)
    steady.settle(model, tokens_BS)
    with torch.no_grad():
        map_TE = model(tokens_BS).routings[0].routing_map_TE
    assert map_TE.sum(0).tolist() == pytest.approx([256] * 4, abs=2)
    assert map_TE.sum(1).unique().tolist()[:3] == [0, 1, 2]


def test_experts_work_in_parts_while_routers_are_set_and_as_before_after_that(model, run_config):
    tokens_BS = random_batch(run_config.model, 16, 64, seed=0).tokens_BS
    experts, caps = model.model.layers[-1].mlp.experts, []
    experts.keeps_all_rows = True
    experts.register_forward_pre_hook(lambda module, _: caps.append((module.keeps_all_rows, module.row_cap(2**20))))
    before = experts.row_cap(2**20)
    steady.share_a_direction(model)
    steady.settle(model, tokens_BS)
    assert caps == [(False, 2**16)]
    assert experts.keeps_all_rows
    assert experts.row_cap(2**20) == before


def test_settling_evens_the_loads_of_top_k(model, run_config):
    twin = twin_with_router(model, "topk")
    steady.share_a_direction(model)
    tokens_BS = random_batch(run_config.model, 16, 64, seed=0).tokens_BS
    with torch.no_grad():
        before = twin(tokens_BS).routings[1].routing_map_TE.sum(0)
        steady.settle(twin, tokens_BS)
        after = twin(tokens_BS).routings[1].routing_map_TE.sum(0)
    assert int(after.max()) < 1.5 * 256 < int(before.max())


def test_routers_with_options_cannot_be_settled(run_config):
    config = dataclasses.replace(run_config.model, router={"name": "relu", "normalize": True})
    with pytest.raises(ConfigError, match="relu or topk without options"):
        steady.settable_layers(ReMoEForCausalLM(config))


def test_a_twin_shares_every_parameter_but_the_routers(model):
    twin = twin_with_router(model, "topk")
    own, other = dict(model.named_parameters()), dict(twin.named_parameters())
    assert own.keys() == other.keys()
    assert {name for name in own if own[name] is not other[name]} == {
        f"model.layers.{layer}.mlp.router.weight" for layer in range(2)
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twins_share_the_optimizers_state_and_a_step_leaves_all_weights_alone(model, run_config, precision):
    run_config = dataclasses.replace(run_config, train=dataclasses.replace(run_config.train, precision=precision))
    batches = [random_batch(run_config.model, 4, 64, seed=0)]
    relu = OurArm("relu", stepper_of(run_config, model, CPU), batches)
    twin = twin_with_router(model, "topk")
    topk_config = dataclasses.replace(run_config, model=twin.config)
    topk = OurArm("topk", twin_stepper(topk_config, twin, relu.stepper), batches)
    assert all(weight.dtype == torch.float32 for weight in topk.stepper.weights.values())
    before = [parameter.detach().clone() for parameter in [*model.parameters(), *twin.parameters()]]
    for arm in (relu, topk, relu):
        assert math.isfinite(arm.step()["loss"])
    after = [*model.parameters(), *twin.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    embedding = model.model.embed_tokens.weight
    assert topk.stepper.optimizer is relu.stepper.optimizer
    assert float(relu.stepper.optimizer.state[embedding]["step"]) == 3
    own_router = twin.model.layers[0].mlp.router.weight
    assert float(relu.stepper.optimizer.state[own_router]["step"]) == 1


def test_capacities_are_those_of_many_steps_of_the_same_routing(model, run_config):
    config = dataclasses.replace(run_config, train=dataclasses.replace(run_config.train, rows="capacity"))
    batches = [random_batch(config.model, 4, 64, seed=seed) for seed in (0, 1)]
    arm = OurArm("relu", stepper_of(config, model, CPU), batches)
    arm.settle_rows()
    with torch.no_grad():
        parts = [part for batch in batches for part in batch.tokens_BS.split(2)]
        most = max(int(model(part).routings[0].routing_map_TE.sum()) for part in parts)
    assert arm.stepper.row_capacities is not None
    assert most <= arm.stepper.row_capacities[0] <= 1.5 * most
    assert not arm.step()  # known to count one step later
    assert not arm.step()["overflowed"]


def test_rows_are_the_dense_start_the_steady_state_of_both_and_their_ratio(run_config):
    torch.manual_seed(0)
    results = bench_model(ModelBench(configs={"tiny": run_config}, peers=[], device=CPU, steps=2))
    results.check()
    start, relu, topk, ratio = results.rows
    assert [(row["phase"], row["candidate"]) for row in (start, relu, topk)] == [
        ("start", "relu"),
        ("steady", "relu"),
        ("steady", "topk"),
    ]
    assert start["density"] > 1.5 * relu["density"]
    assert relu["density"] == pytest.approx(0.25, rel=0.02)
    assert topk["density"] == 0.25
    assert relu["tokens_per_second"] == pytest.approx(4 * 64 / relu["step_ms"] * 1e3)
    assert ratio["stages_extra_time"] == pytest.approx(max(0.0, ratio["start_step"] - 1) * 110 / 60000)
    console().print(model_table(results))
    assert ratio_lines(results)[0].startswith("tiny: ReLU at ")


def test_a_step_with_another_loss_than_the_plain_model_is_an_error(run_config, monkeypatch):
    monkeypatch.setattr(model_bench, "_plain_loss", lambda model, batch, device: 1.0)
    results = bench_model(ModelBench(configs={"tiny": run_config}, peers=[], device=CPU, steps=1))
    with pytest.raises(MismatchError, match=r"tiny, relu: the step's loss is \d\.\d+, the plain model's in fp32 1\.0"):
        results.check()


def test_a_wrong_loss_stands_in_the_row_of_its_model_and_in_the_ratio(run_config, monkeypatch):
    plain_loss = model_bench._plain_loss

    def wrong_for_top_k(model, batch, device):
        return 1.0 if model.config.moe.router_name == "topk" else plain_loss(model, batch, device)

    monkeypatch.setattr(model_bench, "_plain_loss", wrong_for_top_k)
    bench = ModelBench(configs={"tiny": run_config}, peers=[], device=CPU, steps=1, phases=["steady"])
    relu, topk, ratio = bench_model(bench).rows
    assert "mismatches" not in relu
    assert topk["mismatches"] == ratio["mismatches"]


def test_a_dense_model_has_no_routers_to_compare(run_config):
    dense = dataclasses.replace(run_config, model=dataclasses.replace(run_config.model, moe_layers="none"))
    with pytest.raises(ConfigError, match=r"model\.moe_layers is none"):
        bench_model(ModelBench(configs={"dense": dense}, peers=[], device=CPU))


def test_decoding_one_text_is_limited_by_reading_active_weights_and_many_by_all():
    config = ReMoEConfig(vocab_size=100, num_experts=8, top_k=1)
    limits = Limits(matmul_tflops=1e6, copy_gb_per_second=1.0, bytes_a_number=2)
    limit = TextLimits(limits=limits, config=config)
    count = parameter_count(config)
    embedding = 100 * config.hidden_size
    assert limit.decode(1, context=0) == pytest.approx(1e9 / (2 * (count.active - embedding)))
    assert limit.decode(1000, context=0) == pytest.approx(1000 * 1e9 / (2 * (count.total - embedding)), rel=1e-6)


@pytest.mark.heavy
def test_a_mixtral_of_transformers_trains_beside_ours(run_config):
    pytest.importorskip("transformers")
    results = bench_model(ModelBench(configs={"tiny": run_config}, peers=["transformers"], device=CPU, steps=1))
    row = results.rows[-1]
    assert row.get("error") is None
    assert row["candidate"] == "transformers"
    assert row["tokens_per_second"] > 0
