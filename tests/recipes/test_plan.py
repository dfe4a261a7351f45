"""A comparison's runs differ in the router alone."""

import dataclasses

import pytest

from remoe.errors import ConfigError
from remoe.moe.routers import ROUTERS
from remoe.recipes.pairing import check_pairing
from remoe.recipes.plan import Plan, settings_of_batches, trials

TINY = (
    "model.hidden_size=16", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1",
    "model.intermediate_size=8", "model.num_experts=4", "model.top_k=2",
)  # fmt: skip


def plan(routers, **settings):
    return Plan(name="c", config="demo-relu", routers=routers, overrides=TINY, **settings)


def test_trials_are_every_router_with_every_seed():
    planned = trials(plan(["relu", "topk"], seeds=[0, 5]))
    assert [trial.config.name for trial in planned] == ["c/relu-seed0", "c/topk-seed0", "c/relu-seed5", "c/topk-seed5"]
    assert [trial.config.seed for trial in planned] == [0, 0, 5, 5]
    assert [trial.config.model.router for trial in planned] == ["relu", "topk", "relu", "topk"]


def test_dense_is_as_wide_as_the_experts_that_a_token_uses():
    (dense,) = trials(plan(["dense"]))
    assert (dense.config.model.moe_layers, dense.config.model.intermediate_size) == ("none", 16)


def test_overrides_hold_for_every_trial():
    assert {trial.config.model.hidden_size for trial in trials(plan(["relu", "topk", "dense"]))} == {16}


def test_recipe_as_a_router_brings_its_model_but_not_its_batches():
    wide, relu = trials(Plan(name="c", config="demo-relu", routers=["remoe-182m-g4-topk", "relu"]))
    assert (wide.config.model.router, wide.config.model.granularity, wide.config.model.hidden_size) == ("topk", 4, 768)
    assert wide.config.model.vocab_size is None
    assert settings_of_batches(wide.config) == settings_of_batches(relu.config)


def test_dense_config_gets_experts_in_all_layers_for_a_router():
    (relu,) = trials(Plan(name="c", config="demo-dense", routers=["relu"]))
    assert relu.config.model.moe_layers == "all"


@pytest.mark.parametrize(
    ("routers", "seeds", "message"),
    [
        (["relu", "topq"], [0], "--routers names 'topq'.*did you mean 'topk'"),
        (["relu", "demo-densse"], [0], "did you mean 'demo-dense'"),
        (["relu", "zzz"], [0], "must be dense, cosine, .*xmoe or a recipe; `remoe recipes` lists the recipes$"),
        (["relu", "relu"], [0], "--routers names relu twice"),
        (["relu"], [1, 1], "--seeds names 1 twice"),
        ([], [0], "--routers is empty"),
        (["relu"], [], "--seeds is empty"),
    ],
)
def test_plan_that_cannot_be_says_why(routers, seeds, message):
    with pytest.raises(ConfigError, match=message):
        trials(plan(routers, seeds=seeds))


def test_all_shared_parameters_of_a_seed_start_with_the_same_values():
    found = check_pairing(trials(plan(["relu", "topk", "dense"], seeds=[0, 1])), vocab_size=257)
    # embedding, head, last norm; per layer: two norms, four projections, and relu's router and experts like topk's
    assert found == (2, 2 * (3 + 2 * (2 + 4 + 3)))


def test_all_routers_can_be_paired_though_some_start_by_laws_of_their_own():
    found = check_pairing(trials(plan(sorted(ROUTERS))), vocab_size=257)
    assert found.shared_tensors >= 3 + 2 * (2 + 4 + 2)  # all but the routers


def test_pairing_counts_nothing_shared_for_one_run():
    assert check_pairing(trials(plan(["relu"])), vocab_size=257).shared_tensors == 0


def test_runs_of_one_seed_on_other_batches_are_refused():
    first, second = trials(plan(["relu", "topk"]))
    other = dataclasses.replace(second.config.train, batch_size=4)
    changed = dataclasses.replace(second, config=dataclasses.replace(second.config, train=other))
    with pytest.raises(AssertionError, match="do not share their batches"):
        check_pairing([first, changed], vocab_size=257)


def test_runs_that_draw_other_initial_values_are_refused():
    first, second = trials(plan(["relu", "topk"]))
    other = dataclasses.replace(second.config.model, init_std=0.02)
    changed = dataclasses.replace(second, config=dataclasses.replace(second.config, model=other))
    with pytest.raises(ConfigError, match=r"do not start with the same .*model\.init_std"):
        check_pairing([first, changed], vocab_size=257)
