"""Every recipe loads, has the published size, and says where its numbers come from."""

import pytest
import yaml

from remoe.config import from_dict, to_dict
from remoe.errors import ConfigError
from remoe.model.size import flops_per_sequence, parameter_count
from remoe.recipes import about, load, names, read_config, show
from remoe.recipes.results import differences
from remoe.training.config import TrainConfig

# ReMoE spec §3
DENSE = {"182m": 182_471_424, "469m": 469_812_224, "978m": 978_396_672}
MOE = {"182m": 777_087_744, "469m": 2_583_938_048, "978m": 5_735_032_320}
ACTIVE = {"182m": 182_545_152, "469m": 470_008_832, "978m": 978_691_584}
GFLOPS = {"182m": 995.359, "469m": 2873.333, "978m": 5991.479}
BY_EXPERTS = {
    4: 437_312_256, 8: 777_087_744, 16: 1_456_638_720, 32: 2_815_740_672, 64: 5_533_944_576, 128: 10_970_352_384,
}  # fmt: skip
BY_GRANULARITY = {
    2: 777_161_472, 4: 777_308_928, 8: 777_603_840, 16: 778_193_664, 32: 779_373_312, 64: 781_732_608,
}  # fmt: skip
BASELINES = {
    "lory": {"model.router": {"name": "lory", "segment_length": 256}},
    "sparsemixer": {"model.router": {"name": "sparsemixer", "jitter": 0.01}},
    "expert-choice": {"model.router": "expert_choice"},
    "warmup": {"model.router": {"name": "topk", "warmup_steps": 100, "warmup_top_k": 6}},
    "topk-unbalanced": {"losses.load_balancing_coef": 0.0},
    "relu-unbalanced": {"model.router": "relu", "sparsity.load_balanced": False},
}
TOTALS = (
    {f"remoe-{size}-dense": total for size, total in DENSE.items()}
    | {f"remoe-{size}-{router}": total for size, total in MOE.items() for router in ("topk", "relu")}
    | {"remoe-182m-dense-x8": 777_014_016}
    | {"remoe-182m-hash": 777_014_016}  # no router to count
    | {f"remoe-182m-{router}": MOE["182m"] for router in BASELINES}
    | {f"remoe-182m-e{e}-{router}": total for e, total in BY_EXPERTS.items() for router in ("topk", "relu")}
    | {f"remoe-182m-k2-{router}": MOE["182m"] for router in ("topk", "relu")}
    | {f"remoe-182m-g{g}-{router}": total for g, total in BY_GRANULARITY.items() for router in ("topk", "relu")}
)
SMALL = {f"{family}-{router}" for family in ("demo", "pile6", "wiki100") for router in ("relu", "topk", "dense")}


def test_there_is_a_recipe_for_every_model_of_the_tables_and_the_small_ones():
    assert set(names()) >= set(TOTALS) | SMALL
    assert len(names()) == len(set(names()))


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_full_size_recipe_has_the_published_parameter_count(name, total):
    assert parameter_count(read_config(name).model).total == total


@pytest.mark.parametrize("size", MOE)
def test_full_size_recipe_has_the_published_active_parameters_and_flops(size):
    model = read_config(f"remoe-{size}-relu").model
    assert parameter_count(model).active == ACTIVE[size]
    assert flops_per_sequence(model, 1024) / 1e9 == pytest.approx(GFLOPS[size], abs=1e-3)


@pytest.mark.parametrize("name", TOTALS)
def test_full_size_recipe_trains_as_the_paper_does(name):
    config = read_config(name)
    assert config.data.sequence_length * config.train.batch_size * config.train.steps == 31_457_280_000
    assert (config.optimizer.lr, config.optimizer.min_lr, config.optimizer.warmup_steps) == (5e-4, 5e-5, 600)
    assert (config.optimizer.schedule, config.optimizer.weight_decay, config.optimizer.clip) == ("cosine", 0.01, 1.0)
    assert (config.model.vocab_size, config.model.init_std, config.model.rope_theta) == (51_200, 0.01, 1_000_000)
    assert (config.train.precision, config.train.micro_batch_size) == ("bf16", 16)
    assert (config.sparsity.init, config.sparsity.multiplier, config.sparsity.mode) == (1e-8, 1.2, "paper")
    assert config.losses.load_balancing_coef == (0.0 if name == "remoe-182m-topk-unbalanced" else 0.01)


@pytest.mark.parametrize("name", BASELINES)
def test_remoes_baseline_differs_from_top_k_in_what_it_is(name):
    topk, own = (to_dict(read_config(f"remoe-182m-{router}")) for router in ("topk", name))
    changed = {key: after for key, (_, after) in differences(topk, own).items() if key != "name"}
    assert changed == BASELINES[name]


@pytest.mark.parametrize("family", ["demo", "pile6", "wiki100"])
def test_small_recipes_of_a_family_differ_in_name_and_model_only(family):
    relu, topk, dense = (to_dict(read_config(f"{family}-{router}")) for router in ("relu", "topk", "dense"))
    assert [key for key in relu if relu[key] != topk[key]] == ["name", "model"]
    assert [key for key in relu["model"] if relu["model"][key] != topk["model"][key]] == ["router"]
    assert [key for key in relu["model"] if relu["model"][key] != dense["model"][key]] == ["moe_layers"]


@pytest.mark.parametrize("name", sorted(SMALL))
def test_small_recipe_keeps_the_papers_ratios(name):
    config = read_config(name)
    assert config.optimizer.warmup_steps == pytest.approx(config.train.steps / 100, abs=0.5)
    assert config.optimizer.min_lr == config.optimizer.lr / 10
    assert (config.model.num_experts, config.model.top_k, config.sparsity.init) == (8, 1, 1e-8)
    assert config.model.init_std == pytest.approx(0.01 * (768 / config.model.hidden_size) ** 0.5, rel=0.03)


@pytest.mark.parametrize("name", [*TOTALS, *sorted(SMALL)])
def test_shown_recipe_is_complete_yaml_that_gives_the_same_config_and_names_its_origin(name):
    text = show(name)
    assert text.startswith("# ")
    comment = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    assert comment.startswith(about(name))
    assert ("Set data.train" in comment) == (not name.startswith("demo"))
    assert from_dict(TrainConfig, yaml.safe_load(text)) == read_config(name)


def test_recipe_is_a_fresh_copy_that_callers_may_change():
    load("demo-relu")["model"]["router"] = "changed"
    assert load("demo-relu")["model"]["router"] == "relu"


def test_overrides_win_over_the_recipe():
    config = read_config("demo-relu", ["train.steps=7", "name=mine"])
    assert (config.train.steps, config.name) == (7, "mine")


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("remoe-182m-rleu", "did you mean 'remoe-182m-relu'"),
        ("qqq", "`remoe recipes` lists"),
        ("absent.yaml", "absent.yaml does not exist"),
        ("some/folder/absent", "absent does not exist"),
        ("my/corpus.jsonl", "is data, not a config; try: remoe train demo-relu --set data.train=my/corpus.jsonl"),
    ],
)
def test_config_that_is_nothing_says_what_was_looked_for(source, hint):
    with pytest.raises(ConfigError, match=hint):
        read_config(source)


def test_bases_of_recipes_are_no_recipes():
    assert not [name for name in names() if name.startswith("_")]
    with pytest.raises(ConfigError, match="neither a YAML file nor a recipe"):
        read_config("_remoe")


def test_yaml_file_of_ones_own_is_read(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("name: own\nmodel: {num_experts: 4}\n", encoding="utf-8")
    assert read_config(str(path)).model.num_experts == 4
