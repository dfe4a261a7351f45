"""The fine-tuning recipes hold RMoE's settings."""

import math

import pytest

from remoe.recipes import load, names, read_config

ROWS = 52_002  # of Stanford Alpaca


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("rmoe-alpaca", "none"),
        ("rmoe-alpaca-freeze-router", "head"),
        ("rmoe-alpaca-freeze-router-and-cell", "head_and_cell"),
    ],
)
def test_rmoe_s_settings_of_fine_tuning(name, frozen):
    config = read_config(name)  # RMoE §4.12
    assert config.train.batch_size == 128
    assert config.train.steps == math.ceil(3 * ROWS / 128)
    assert config.optimizer.warmup_steps == math.ceil(0.03 * config.train.steps)
    assert (config.optimizer.lr, config.optimizer.schedule, config.optimizer.weight_decay) == (2e-5, "cosine", 0.0)
    assert config.train.precision == "bf16"
    assert config.train.freeze_router == frozen
    assert config.data.holds_instructions
    assert "model" not in load(name)  # it comes from train.init_from


def test_every_mode_of_the_paper_has_its_recipe():
    assert len([name for name in names() if name.startswith("rmoe-alpaca")]) == 3
