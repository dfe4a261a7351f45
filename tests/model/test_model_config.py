"""Facts about the model's settings."""

import pytest

from remoe.errors import ConfigError
from remoe.model import ReMoEConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 0}, r"model\.hidden_size is 0, must be at least 1"),
        ({"vocab_size": 0}, r"model\.vocab_size is 0, must be at least 1"),
        ({"num_layers": 0}, r"model\.num_layers is 0"),
        ({"num_heads": 3}, r"model\.num_heads is 3, must divide model\.hidden_size = 256"),
        ({"num_heads": 4, "num_kv_heads": 3}, r"model\.num_kv_heads is 3, must divide model\.num_heads = 4"),
        ({"num_kv_heads": 0}, r"model\.num_kv_heads is 0"),
        ({"head_size": 7}, r"model\.head_size is 7, must be even"),
        ({"head_size": 0}, r"model\.head_size is 0, must be even and at least 2"),
        (
            {"num_layers": 10**30},
            r"model\.num_layers is 1000000000000000000000000000000, must be between 1 and 1000000",
        ),
        ({"head_size": 2**40}, r"model\.head_size is 1099511627776, must be between 1 and 1000000"),
        ({"num_experts": 2**31}, "num_experts is 2147483648, must be between 1 and 1000000"),
        ({"rope_theta": float("nan")}, r"model\.rope_theta is nan, must be above 0"),
        ({"norm_eps": float("inf")}, r"model\.norm_eps is inf, must be above 0"),
        ({"router": {"name": "rmoe", "state_size": 2**40}}, "router option state_size is 1099511627776, must be"),
        ({"router": {"name": "rmoe", "scale": float("nan")}}, "router option scale is nan, must be between"),
        ({"moe_layers": "some"}, r"model\.moe_layers is 'some'"),
        ({"moe_layers": [0, 4]}, r"model\.moe_layers names layer 4, must be between 0 and 3"),
        ({"top_k": 9}, "top_k is 9, must be between 1 and num_experts = 8"),
        ({"granularity": 3}, "granularity is 3, must divide"),
        ({"rope_theta": 0.0}, r"model\.rope_theta is 0\.0, must be above 0"),
        ({"norm_eps": -1e-5}, r"model\.norm_eps is -1e-05, must be above 0"),
        ({"init_std": 0.0}, r"model\.init_std is 0\.0, must be above 0"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        ReMoEConfig(**settings)


def test_layers_with_experts_are_all_none_or_listed():
    for moe_layers, expected in (("all", [0, 1, 2, 3]), ("none", []), ([1, 3], [1, 3]), ([], [])):
        config = ReMoEConfig(moe_layers=moe_layers)
        assert [layer for layer in range(4) if config.is_moe_layer(layer)] == expected
        assert config.num_moe_layers == len(expected)


def test_head_sizes_follow_from_the_hidden_size_unless_set():
    assert ReMoEConfig(hidden_size=256, num_heads=4).head_width == 64
    assert ReMoEConfig(hidden_size=256, num_heads=4, head_size=32).head_width == 32
    assert ReMoEConfig(num_kv_heads=None, num_heads=4).kv_heads == 4
