"""Every parameter count of RMoE's tables (RMoE §5), exactly: counted from the config and in the built model."""

import pytest
import torch

from remoe.model import ReMoEConfig, ReMoEForCausalLM
from remoe.model.size import parameter_count

CHARACTERS = {
    "block": "post_norm",
    "vocab_size": 205,
    "num_heads": 8,
    "num_kv_heads": None,
    "num_experts": 16,
    "top_k": 2,
}
MEDIUM = CHARACTERS | {"num_layers": 8, "hidden_size": 352, "intermediate_size": 352}
SMALL = CHARACTERS | {"num_layers": 6, "hidden_size": 264, "intermediate_size": 264}
LLAMA = {
    "vocab_size": 96_512, "num_layers": 24, "hidden_size": 1280, "num_heads": 20, "num_kv_heads": None,
    "intermediate_size": 448, "num_experts": 16, "top_k": 4,
}  # fmt: skip
SMOE = {"name": "topk", "bias": True}
XMOE = {"name": "xmoe", "dead_gate": True, "learn_temperature": False}
RMOE = {"name": "rmoe", "bias": True}
SHARED_PROJECTION = RMOE | {"projector": "shared"}

# RMoE §5.3 and 5.4: router, its parameters in the medium model, totals of the medium and the small model
TABLE = {
    "smoe": (SMOE, 45_184, 36_076_813, 15_319_165),
    "random": ("random", 45_184, 36_076_813, 15_319_165),
    "cosine": ({"name": "cosine", "learn_temperature": False}, 45_056, 36_076_685, None),
    "mlp": ("mlp", 755_840, 36_787_469, 15_725_437),
    "hyper": ({"name": "hyper", "dead_gate": True}, 12_383_232, 48_414_861, 22_265_869),
    "xmoe-8": (XMOE | {"projection_size": 8}, 68_736, 36_100_365, None),
    "xmoe-16": (XMOE, 92_288, 36_123_917, 15_346_045),
    "xmoe-16 with temperatures": (XMOE | {"learn_temperature": True}, 92_296, 36_123_925, None),
    "xmoe-32": (XMOE | {"projection_size": 32}, 139_392, 36_171_021, None),
    "xmoe-16 clean": (XMOE | {"dead_gate": False}, 47_104, 36_078_733, None),
    "rmoe": (RMOE, 477_056, 36_508_685, 15_608_701),
    "np": (RMOE | {"passing": "none"}, 477_056, 36_508_685, 15_608_701),
    "sproj": (SHARED_PROJECTION, 201_600, 36_233_229, 15_457_405),
    "rnn": (RMOE | {"cell": "rnn"}, 411_008, 36_442_637, 15_542_653),
    "lstm": (RMOE | {"cell": "lstm"}, 510_080, 36_541_709, 15_641_725),
}
DEPTHS = {12: (30_462_301, 30_942_301), 18: (45_605_437, 46_275_901), 24: (60_748_573, 61_609_501)}  # SMoE, RMoE
DEPTHS[32] = (80_939_421, 82_054_301)


def total(**settings):
    """Counted from the config, and the same in the model."""
    config = ReMoEConfig(**settings)
    counted = parameter_count(config).total
    assert counted == sum(parameter.numel() for parameter in built(config).parameters())
    return counted


def built(config):
    with torch.device("meta"):
        return ReMoEForCausalLM(config)


@pytest.mark.parametrize("name", TABLE)
def test_medium_character_model_has_the_published_size(name):
    router, of_router, expected, _ = TABLE[name]
    assert total(**MEDIUM, router=router) == expected
    assert expected - of_router == 36_031_629


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row[3]])
def test_small_character_model_has_the_published_size(name):
    router, _, _, expected = TABLE[name]
    assert total(**SMALL, router=router) == expected


@pytest.mark.parametrize("depth", DEPTHS)
def test_depth_study_has_the_published_sizes(depth):
    sizes = [total(**SMALL | {"num_layers": depth}, router=router) for router in (SMOE, RMOE)]
    assert tuple(sizes) == DEPTHS[depth]


@pytest.mark.parametrize(("depth", "smoe", "rmoe"), [(12, 220, 248), (18, 328, 368), (24, 436, 488), (32, 580, 648)])
def test_depth_study_has_the_tensors_that_the_dumps_list(depth, smoe, rmoe):
    for router, expected in ((SMOE, smoe), (RMOE, rmoe)):
        assert len(built(ReMoEConfig(**SMALL | {"num_layers": depth}, router=router)).state_dict()) == expected


def test_parts_of_the_router_have_the_published_sizes():
    parameters = dict(built(ReMoEConfig(**MEDIUM, router=RMOE)).named_parameters())
    cell = sum(value.numel() for name, value in parameters.items() if ".router_cell." in name)
    layer = {name: value.numel() for name, value in parameters.items() if "layers.3.mlp.router" in name}
    assert cell == 99_072
    assert sorted(layer.values()) == [16, 128, 16 * 128, 352 * 128]
    shared = dict(built(ReMoEConfig(**MEDIUM, router=SHARED_PROJECTION)).named_parameters())
    assert sum(value.numel() for name, value in shared.items() if ".router_cell." in name) == 185_088


@pytest.mark.parametrize(
    ("router", "extra"),
    [
        ({"state_size": 128}, 3_588_864),
        ({"state_size": 256}, 7_865_856),
        ({"state_size": 512}, 17_009_664),
        ({"state_size": 256, "cell": "rnn"}, 7_602_688),
        ({"cell_bias": False}, 3_588_096),
    ],
)
def test_large_model_pays_what_the_spec_counts_for_its_router(router, extra):
    linear = total(**LLAMA, router="topk")
    assert total(**LLAMA, router={"name": "rmoe", **router}) - linear == extra
    norms_and_vocabulary = 49 * 1280 + 2 * 96_512 * 1280
    assert linear - norms_and_vocabulary == 660_602_880 + 157_286_400 + 491_520
    assert parameter_count(ReMoEConfig(**LLAMA, router="topk")).active - norms_and_vocabulary == pytest.approx(
        323.0e6, rel=1e-3
    )


def test_granularity_and_dense_layers_are_counted_too():
    whole = total(**MEDIUM, router=SMOE)
    biases_and_router_rows = 3 * 8 * 16 * 352 + 3 * 8 * 16 * (352 + 1)  # four parts an expert: outputs and logits
    assert total(**MEDIUM | {"granularity": 4}, router=SMOE) == whole + biases_and_router_rows
    expert, norms, router = 2 * 352 * 352 + 2 * 352, 2 * 2 * 352, 16 * (352 + 1)
    for layers, num_dense in (([1, 3], 6), ("none", 8)):
        less = num_dense * (15 * expert + norms + router)
        assert total(**MEDIUM | {"moe_layers": layers}, router=SMOE) == whole - less
