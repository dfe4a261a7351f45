"""The published sizes (ReMoE §3, TV6, TV13), exactly, and the memory estimate against what autograd keeps."""

from dataclasses import asdict

import pytest
import torch

from remoe import SparsityController, build_router
from remoe.errors import ConfigError
from remoe.model import ReMoEConfig, ReMoEForCausalLM
from remoe.model.placement import place_tokens
from remoe.model.size import Workload, flops_per_sequence, flops_per_token, parameter_count, plan

PAPER = {
    "182m": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "num_kv_heads": 4, "intermediate_size": 3072},
    "469m": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "num_kv_heads": 4, "intermediate_size": 4096},
    "978m": {"hidden_size": 1536, "num_layers": 24, "num_heads": 16, "num_kv_heads": 4, "intermediate_size": 6144},
}


def paper(size: str = "182m", **settings) -> ReMoEConfig:
    return ReMoEConfig(**{"vocab_size": 51_200} | PAPER[size] | settings)


@pytest.mark.parametrize(
    ("size", "dense", "total", "active", "gflop"),
    [
        ("182m", 182_471_424, 777_087_744, 182_545_152, 995.359),
        ("469m", 469_812_224, 2_583_938_048, 470_008_832, 2873.333),
        ("978m", 978_396_672, 5_735_032_320, 978_691_584, 5991.479),
    ],
)
def test_sizes_of_the_main_table(size, dense, total, active, gflop):
    dense_count = parameter_count(paper(size, moe_layers="none"))
    assert (dense_count.total, dense_count.active) == (dense, dense)
    count = parameter_count(paper(size))
    assert (count.total, count.active) == (total, active)
    assert flops_per_sequence(paper(size), 1024) / 1e9 == pytest.approx(gflop, abs=5e-4)
    assert flops_per_token(paper(size, moe_layers="none"), 1024) == flops_per_token(paper(size), 1024)


@pytest.mark.parametrize(
    ("num_experts", "total"),
    [
        (4, 437_312_256),
        (8, 777_087_744),
        (16, 1_456_638_720),
        (32, 2_815_740_672),
        (64, 5_533_944_576),
        (128, 10_970_352_384),
    ],
)
def test_totals_over_the_number_of_experts(num_experts, total):
    assert parameter_count(paper(num_experts=num_experts)).total == total


@pytest.mark.parametrize(
    ("granularity", "experts", "top_k", "width", "total"),
    [
        (1, 8, 1, 3072, 777_087_744),
        (2, 16, 2, 1536, 777_161_472),
        (4, 32, 4, 768, 777_308_928),
        (8, 64, 8, 384, 777_603_840),
        (16, 128, 16, 192, 778_193_664),
        (32, 256, 32, 96, 779_373_312),
        (64, 512, 64, 48, 781_732_608),
    ],
)
def test_totals_over_granularity(granularity, experts, top_k, width, total):
    config = paper(granularity=granularity)
    assert (config.moe.routed_experts, config.moe.routed_top_k, config.moe.expert_size) == (experts, top_k, width)
    assert parameter_count(config).total == total
    assert flops_per_token(config, 1024) == flops_per_token(paper(), 1024)


def test_granularity_of_eight_has_the_worked_router_and_target():
    config = paper(granularity=8)
    assert build_router("relu", 768, config.moe.routed_experts, config.moe.routed_top_k).weight.numel() == 49_152
    controller = SparsityController(config.moe.routed_top_k, config.moe.routed_experts)
    assert controller.target_sparsity == 0.875


def test_dense_of_eight_times_the_width_has_the_published_size():
    assert parameter_count(paper(moe_layers="none", intermediate_size=24_576)).total == 777_014_016


def test_a_granularity_that_does_not_divide_the_width_is_refused():
    with pytest.raises(ConfigError, match="granularity is 5, must divide"):
        paper(granularity=5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"router": "topk", "granularity": 4, "top_k": 2},
        {"moe_layers": [1, 3], "tie_embeddings": True},
        {"moe_layers": "none", "num_kv_heads": None},
        {"head_size": 32, "num_heads": 3, "num_kv_heads": 1},
    ],
)
def test_the_formula_counts_what_the_module_has(settings):
    config = paper(num_experts=4, **settings)
    with torch.device("meta"):
        model = ReMoEForCausalLM(config)
    assert parameter_count(config).total == sum(parameter.numel() for parameter in model.parameters())


def test_active_parameters_are_those_of_top_k_experts():
    one, two = (parameter_count(paper(top_k=top_k)) for top_k in (1, 2))
    assert two.active - one.active == 12 * 3 * 768 * 3072
    assert two.total == one.total


def test_sizes_need_a_vocabulary():
    with pytest.raises(ConfigError, match=r"model\.vocab_size is null"):
        parameter_count(ReMoEConfig())


def test_a_plan_is_plain_values():
    values = asdict(plan(paper(), Workload(sequence_length=1024, micro_batch_size=16, precision="bf16")))
    assert values["parameters"] == {"total": 777_087_744, "active": 182_545_152}
    assert values["flops_per_token"] == 972_029_952
    memory = values["memory"]
    assert memory["weights"] == memory["gradients"] == 4 * 777_087_744
    assert memory["optimizer"] == 8 * 777_087_744
    fixed = memory["weights"] + memory["gradients"] + memory["optimizer"] + memory["compute_copies"]
    assert memory["total"] == fixed + memory["activations"]


def test_relu_routing_starts_with_half_of_all_experts_and_top_k_does_not():
    workload = Workload(sequence_length=1024, micro_batch_size=16, precision="bf16")
    relu, topk, four = (
        plan(paper(**settings, kernels="grouped_mm"), workload).memory
        for settings in ({}, {"router": "topk"}, {"router": "topk", "top_k": 4})
    )
    assert relu.activations == topk.activations == topk.activations_at_start
    assert relu.activations_at_start == four.activations > 1.3 * relu.activations


def test_chunks_bound_the_memory_of_the_dense_start():
    workload = Workload(sequence_length=1024, micro_batch_size=32, precision="bf16")
    chunked, kept = (plan(paper(kernels=kernels), workload).memory for kernels in ("auto", "grouped_mm"))
    assert chunked.activations == kept.activations
    assert chunked.activations_at_start < 1.15 * chunked.activations < kept.activations_at_start


def test_activation_checkpointing_is_estimated_to_take_less():
    settings = {"sequence_length": 1024, "micro_batch_size": 16, "precision": "bf16"}
    config = paper(vocab_size=512)
    plain, checkpointed = (
        plan(config, Workload(**settings, activation_checkpointing=on)).memory for on in (False, True)
    )
    assert checkpointed.activations < 0.3 * plain.activations
    assert checkpointed.weights == plain.weights
    selective = plan(config, Workload(**settings, activation_checkpointing="selective")).memory
    assert checkpointed.activations < selective.activations < 0.8 * plain.activations


def kept_bytes(config: ReMoEConfig, tokens_BS: torch.Tensor, precision: str) -> int:
    """What autograd keeps between forward and backward, parameters and their bf16 copies aside."""
    model = ReMoEForCausalLM(config)
    shapes = {parameter.shape for parameter in model.parameters()}
    shapes |= {parameter.T.shape for parameter in model.parameters() if parameter.dim() == 2}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.shape not in shapes and tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        outputs = model.model(tokens_BS, place_tokens(tokens_BS, None, None, None), None)
        total = sum(size for size, _ in kept.values())
    del outputs
    return total


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{"moe_layers": "none"}, {"router": "topk", "top_k": 2, "num_experts": 8}])
def test_the_estimate_of_activations_is_near_what_autograd_keeps(settings, precision):
    config = ReMoEConfig(**{"vocab_size": 3, "hidden_size": 128, "num_layers": 6, "intermediate_size": 320} | settings)
    tokens_BS = torch.zeros(4, 130, dtype=torch.int64)
    workload = Workload(sequence_length=130, micro_batch_size=4, precision=precision)
    norms = 4 * 128 * (2 * 6 + 1) * tokens_BS.numel()  # a CPU keeps one more copy at each norm
    measured = kept_bytes(config, tokens_BS, precision) - norms
    rows = 2 * (3 * 128 + 3 * 320) * (2 if precision == "bf16" else 4) + 2 * 4 * 128 * (precision == "bf16")
    temporary = rows * tokens_BS.numel() if config.num_moe_layers else 0
    estimated = plan(config, workload).memory.activations - temporary
    assert estimated == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("segment_length", [16, 64])
def test_merged_experts_are_counted_with_what_autograd_keeps(segment_length):
    router = {"name": "lory", "segment_length": segment_length}
    config = ReMoEConfig(vocab_size=3, hidden_size=128, num_layers=6, intermediate_size=320, router=router, top_k=1)
    tokens_BS = torch.zeros(4, 130, dtype=torch.int64)
    workload = Workload(sequence_length=130, micro_batch_size=4)
    segments = 4 * -(-130 // segment_length)
    gradients = 4 * segments * 3 * 128 * 320  # of one layer's merged matrices, in its backward pass
    rows = 4 * (3 * 128 + 3 * 320) * tokens_BS.numel()
    estimated = plan(config, workload).memory.activations - gradients - rows
    measured = kept_bytes(config, tokens_BS, "fp32") - 4 * 128 * (2 * 6 + 1) * tokens_BS.numel()
    assert estimated == pytest.approx(measured, rel=0.05)
    assert 6 * gradients > 0.3 * estimated


def test_checkpointed_layers_keep_one_layers_merged_experts():
    settings = {"vocab_size": 3, "hidden_size": 128, "num_layers": 6, "intermediate_size": 320}
    lory, topk = (ReMoEConfig(**settings, router=router) for router in ("lory", "topk"))
    workload = Workload(sequence_length=512, micro_batch_size=2, activation_checkpointing=True)
    a_layer = 4 * 2 * 2 * 3 * 128 * 320
    extra = plan(lory, workload).memory.activations - plan(topk, workload).memory.activations
    assert extra == 2 * a_layer


@pytest.mark.parametrize("settings", [{"attention_span": 96}, {"attention_span": 400, "num_heads": 2}])
def test_the_estimate_of_a_post_norm_models_activations_is_near_what_autograd_keeps(settings):
    character = {"vocab_size": 3, "block": "post_norm", "hidden_size": 64, "num_layers": 4, "num_kv_heads": None}
    experts = {"intermediate_size": 64, "num_experts": 8, "top_k": 2, "router": "topk"}
    config = ReMoEConfig(**character | experts | settings)
    tokens_BS = torch.zeros(4, 130, dtype=torch.int64)
    estimated = plan(config, Workload(sequence_length=130, micro_batch_size=4)).memory.activations
    assert estimated == pytest.approx(kept_bytes(config, tokens_BS, "fp32"), rel=0.2)
