"""The recipes for what users of ReLU routing ask for next: each differs from its base in the one thing it compares."""

import pytest

from remoe.config import to_dict
from remoe.model.size import parameter_count
from remoe.recipes import names, read_config, show
from remoe.recipes.catalog import merge
from remoe.recipes.comparison import compare
from remoe.recipes.plan import Plan, trials
from remoe.recipes.results import differences
from remoe.training import Run

CHANGES = {
    "normalized": {"model.router": {"name": "relu", "normalize": True}},
    "revived": {"sparsity.density_floor": 0.5, "sparsity.revival_coef": 0.01},
    "proportional": {"sparsity.rule": "proportional"},
    "dead-band": {"sparsity.dead_band": 0.002},
    "averaged": {"sparsity.average": 0.8, "sparsity.dead_band": 0.002},
    "held": {"sparsity.hold_below_lr": 0.2},
    "per-layer": {"sparsity.per_layer": True},
}
OPTIONS = [f"{family}-{option}" for family in ("demo", "wiki100-deep") for option in CHANGES]
TWO_EXPERTS = [f"{family}-k2-{router}" for family in ("demo", "pile6", "wiki100") for router in ("relu", "topk")]


def changes(name: str, base: str) -> dict:
    found = differences(to_dict(read_config(base)), to_dict(read_config(name)))
    return {key: after for key, (_, after) in found.items() if key != "name"}


@pytest.mark.parametrize("name", OPTIONS)
def test_recipe_of_an_option_differs_from_its_base_in_that_option_only(name):
    family = "wiki100-deep" if name.startswith("wiki100-deep") else "demo"
    assert name in names()
    found = changes(name, f"{family}-relu")
    expected = CHANGES[name.removeprefix(f"{family}-")]
    assert found == expected
    assert show(name).startswith("# Ours")


@pytest.mark.parametrize("name", TWO_EXPERTS)
def test_recipe_with_two_experts_differs_from_its_base_in_top_k_only(name):
    assert changes(name, name.replace("-k2", "")) == {"model.top_k": 2}


def test_two_experts_of_the_182m_model_have_the_parameters_of_one_and_those_of_one_more_are_active():
    count = parameter_count(read_config("remoe-182m-k2-relu").model)
    assert count.total == 777_087_744
    assert count.active == 182_545_152 + 12 * 3 * 768 * 3072


def test_deep_recipes_have_the_shape_of_the_pilot_that_starved():
    model = read_config("wiki100-deep-relu").model
    assert (model.num_layers, model.hidden_size, model.num_experts, model.top_k) == (8, 512, 8, 1)
    assert changes("wiki100-deep-topk", "wiki100-deep-relu") == {"model.router": "topk"}


def test_a_router_takes_no_option_of_the_one_it_replaces():
    base = {"model": {"top_k": 1, "router": {"name": "relu", "normalize": True}}}
    changed = merge(base, {"model": {"router": {"name": "topk", "renormalize": True}}})
    assert changed == {"model": {"top_k": 1, "router": {"name": "topk", "renormalize": True}}}
    plan = Plan(name="c", config="demo-normalized", routers=["demo-normalized", "demo-relu"])
    assert [trial.config.model.router for trial in trials(plan)] == [{"name": "relu", "normalize": True}, "relu"]


def test_options_are_compared_with_their_base_over_the_same_batches(tiny_overrides, tmp_path):
    routers = ["demo-relu", *(f"demo-{option}" for option in CHANGES), "demo-k2-relu"]
    plan = Plan(name="c", config="demo-relu", routers=routers, overrides=tiny_overrides)
    result = compare(plan, root=tmp_path, say=lambda _: None)
    assert [row.router for row in result.rows] == routers
    runs = {path.name: Run.open(path) for path in result.runs}
    assert runs["demo-revived-seed0"].config.sparsity.density_floor == 0.5
    assert "revival" in runs["demo-revived-seed0"].metrics()[-1]
    assert all(run.valid_loss > 0 for run in runs.values())
