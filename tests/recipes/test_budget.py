"""What a run computed, from its metrics, and how many steps cost a budget."""

import json

import pytest

from remoe.config import from_dict, to_yaml
from remoe.model import ReMoEConfig
from remoe.model.size import flops_per_token, parameter_count, router_flops, training_flops_per_token
from remoe.recipes.budget import at_equal_flops, steps_within, training_flops
from remoe.recipes.plan import Plan, trials
from remoe.training import Run, TrainConfig

MODEL = {
    "vocab_size": 50, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 24,
    "num_experts": 4,
}  # fmt: skip
ATTENTION_AND_HEAD = 2 * (4 * 16 * 16 + 2 * 8 * 16) + 16 * 50  # multiply-adds a token
EXPERT, ROUTER = 3 * 16 * 24, 4 * 16


def write_run(folder, active_experts, **model):
    """A run of 8 steps of 32 tokens."""
    values = {"name": folder.name, "model": MODEL | model, "data": {"sequence_length": 8}, "train": {"steps": 8}}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(from_dict(TrainConfig, values)))
    lines = [
        {"step": step, "tokens": step * 32, "active_experts": active}
        for step, active in zip(range(1, 9), active_experts, strict=True)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Run.open(folder)


def cost(active, steps=1):
    return steps * 32 * 6 * (ATTENTION_AND_HEAD + 2 * (EXPERT * active + ROUTER))


def test_flops_are_those_of_the_experts_that_were_active(tmp_path):
    run = write_run(tmp_path / "relu", [3.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.5])
    assert training_flops(run) == pytest.approx(sum(map(cost, [3, 2, 2, 1, 1, 1, 1, 1.5])), rel=1e-12)


def test_dense_runs_have_no_experts_and_no_router(tmp_path):
    run = write_run(tmp_path / "dense", [None] * 8, moe_layers="none")
    assert training_flops(run) == pytest.approx(8 * 32 * 6 * (ATTENTION_AND_HEAD + 2 * EXPERT), rel=1e-12)


def test_steps_within_a_budget_are_read_off_the_runs_own_curve_and_go_on_at_its_late_rate(tmp_path):
    run = write_run(tmp_path / "relu", [4.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert steps_within(run, training_flops(run)) == 8
    assert steps_within(run, cost(4, 2) + cost(1, 3)) == 5
    assert steps_within(run, training_flops(run) + cost(1, 7)) == 15
    assert steps_within(run, 1.0) == 1


def test_trials_at_equal_flops_are_as_long_as_the_first_routers_compute_takes(tmp_path):
    overrides = tuple(f"model.{key}={value}" for key, value in MODEL.items())
    planned = trials(
        Plan(name="c", config="demo-relu", routers=["relu", "topk"], overrides=(*overrides, "train.steps=8"))
    )
    dense_start = [4.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    write_run(tmp_path / "c" / "relu-seed0", dense_start)
    write_run(tmp_path / "c" / "topk-seed0", [1.0] * 8, router="topk")
    relu, topk = at_equal_flops(planned, tmp_path)
    assert relu is planned[0]
    extra = 6 * EXPERT * 2 / (ATTENTION_AND_HEAD + 2 * (EXPERT + ROUTER))
    assert topk.config.train.steps == round(8 + extra) > 8
    assert topk.config.name == "c/topk-seed0-equal-flops"


@pytest.mark.parametrize(
    ("router", "multiply_adds"),
    [
        ("topk", 352 * 16),
        ("hash", 0),
        ("rmoe", 352 * 128 + 6 * 128 * 128 + 128 * 16),  # RMoE §2.13: 145,408
        ("recurrent_relu", 145_408),
        ("mlp", 352 * 256 + 256 * 16),
        ("xmoe", 352 * 16 + 16 * 16),
    ],
)
def test_router_flops_are_those_of_its_products(router, multiply_adds):
    config = ReMoEConfig(**MODEL | {"hidden_size": 352, "num_experts": 16, "top_k": 2, "router": router})
    assert router_flops(config) == 2 * multiply_adds


def test_flops_of_top_k_are_the_papers_where_top_k_experts_are_active():
    config = ReMoEConfig(**MODEL | {"granularity": 3, "top_k": 2, "router": "topk"})
    assert flops_per_token(config, 8, active_experts=6) == flops_per_token(config, 8)
    assert training_flops_per_token(config, 8, 6.0) == flops_per_token(config, 8) + 3 * 2 * 2 * 16 * 12


def test_merged_experts_cost_one_expert_and_the_merging():
    config = ReMoEConfig(**MODEL | {"router": {"name": "lory", "segment_length": 8}})
    expected = flops_per_token(config, 8, active_experts=1 + 4 / 8) + 3 * 2 * router_flops(config)
    assert training_flops_per_token(config, 8, 4.0) == pytest.approx(expected)


def test_post_norm_model_counts_its_span_and_its_two_matrix_experts():
    config = ReMoEConfig(**MODEL | {"block": "post_norm", "attention_span": 10, "router": "topk"})
    multiply_adds = 2 * (4 * 16 * 16 + 3 * 10 * 16) + 16 * 50 + 2 * 2 * 16 * 24
    assert flops_per_token(config, 8) == 6 * multiply_adds
    assert parameter_count(config).active < parameter_count(config).total
