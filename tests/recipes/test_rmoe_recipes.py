"""RMoE's recipes: published settings and sizes, arms that differ in the router alone, and some that really train."""

import pytest
import yaml

from remoe.config import from_dict, to_dict
from remoe.eval import evaluate_checkpoint
from remoe.model.size import parameter_count
from remoe.recipes import about, names, read_config, show
from remoe.training import TrainConfig, load, train

ROUTERS = (
    "smoe", "random", "mlp", "cosine", "xmoe", "xmoe-gru", "hyper", "rmoe", "np", "detach", "sproj", "rnn", "lstm",
)  # fmt: skip
CHARACTERS = [f"rmoe-char-{size}-{router}" for size in ("small", "medium") for router in ROUTERS]
OTHERS = ["rmoe-words-smoe", "rmoe-words-rmoe", "rmoe-llama-24l-smoe", "rmoe-llama-24l-rmoe"]
MILLIONS = {  # with the paper's 205 symbols, RMoE §5.3 and 5.4
    "rmoe-char-medium-smoe": 36_076_813, "rmoe-char-medium-random": 36_076_813, "rmoe-char-medium-mlp": 36_787_469,
    "rmoe-char-medium-cosine": 36_076_693, "rmoe-char-medium-xmoe": 36_123_925, "rmoe-char-medium-hyper": 48_414_861,
    "rmoe-char-medium-rmoe": 36_508_685, "rmoe-char-medium-np": 36_508_685, "rmoe-char-medium-detach": 36_508_685,
    "rmoe-char-medium-sproj": 36_233_229, "rmoe-char-medium-rnn": 36_442_637, "rmoe-char-medium-lstm": 36_541_709,
    "rmoe-char-small-smoe": 15_319_165, "rmoe-char-small-mlp": 15_725_437, "rmoe-char-small-rmoe": 15_608_701,
    "rmoe-char-small-sproj": 15_457_405, "rmoe-char-small-rnn": 15_542_653, "rmoe-char-small-lstm": 15_641_725,
}  # fmt: skip


def test_there_is_a_recipe_for_each_of_rmoes_models():
    found = [name for name in names() if name.startswith("rmoe-") and not name.startswith("rmoe-alpaca")]
    assert found == sorted([*CHARACTERS, *OTHERS], key=names().index)


@pytest.mark.parametrize("name", [*CHARACTERS, *OTHERS])
def test_shown_recipe_gives_the_same_config_and_names_its_origin(name):
    text = show(name)
    comment = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    assert comment.startswith(about(name))
    assert "data.train" in comment
    assert from_dict(TrainConfig, yaml.safe_load(text)) == read_config(name)


@pytest.mark.parametrize("name", MILLIONS)
def test_character_model_has_the_published_size_with_the_papers_symbols(name):
    # cosine and xmoe learn one temperature a layer, which the printed counts leave out or round away
    assert parameter_count(read_config(name, ["model.vocab_size=205"]).model).total == MILLIONS[name]


@pytest.mark.parametrize("size", ["small", "medium"])
def test_character_recipes_of_a_size_differ_in_the_router_alone(size):
    first, *rest = (to_dict(read_config(f"rmoe-char-{size}-{router}")) for router in ROUTERS)
    for other in rest:
        assert [key for key in first if first[key] != other[key]] == ["name", "model"]
        assert [key for key in first["model"] if first["model"][key] != other["model"][key]] == ["router"]


@pytest.mark.parametrize(("size", "steps", "warmup"), [("small", 60_000, 3_000), ("medium", 80_000, 4_000)])
def test_character_recipe_trains_as_the_paper_does(size, steps, warmup):
    config = read_config(f"rmoe-char-{size}-rmoe")
    assert config.train.batch_size * config.data.sequence_length == 48 * 512
    assert (config.train.steps, config.optimizer.warmup_steps, config.optimizer.lr) == (steps, warmup, 7e-4)
    assert (config.optimizer.schedule, config.optimizer.clip, config.optimizer.weight_decay) == ("constant", 0, 0)
    assert (config.model.dropout, config.model.attention_span, config.losses.load_balancing_coef) == (0.1, 2048, 0.01)
    assert config.model.init_std == pytest.approx((3 * config.model.hidden_size) ** -0.5, rel=2e-3)


def test_pretraining_recipes_have_the_published_sizes_and_tokens():
    smoe, rmoe = (read_config(f"rmoe-llama-24l-{router}") for router in ("smoe", "rmoe"))
    assert parameter_count(rmoe.model).total - parameter_count(smoe.model).total == 3_588_864
    assert parameter_count(smoe.model).total == 1_065_514_240
    assert smoe.train.steps * smoe.train.batch_size * smoe.data.sequence_length == pytest.approx(45.9e9, rel=1e-3)


TINY = (
    "model.hidden_size=16", "model.num_layers=2", "model.num_heads=2", "model.intermediate_size=16",
    "model.num_experts=4", "model.attention_span=12", "data.sequence_length=16", "train.steps=3", "train.batch_size=4",
    "train.micro_batch_size=2", "train.validation_batches=2", "train.device=cpu", "optimizer.warmup_steps=1",
)  # fmt: skip


@pytest.mark.parametrize("name", ["rmoe-char-small-smoe", "rmoe-char-small-rmoe", "rmoe-words-rmoe"])
def test_small_copy_of_a_recipe_trains_validates_and_comes_back(name, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"line {i} of a text and {i * i} is its square" for i in range(200)), encoding="utf-8")
    own = (f"data.train={text}", "data.validation=null", f"data.cache={tmp_path / 'cache'}")
    run = train(read_config(name, [*TINY, *own]), root=tmp_path)
    lines = run.metrics()
    assert [line["active_experts"] for line in lines] == [2.0, 2.0, 2.0]
    assert all(line["load_balancing_coef"] == pytest.approx(0.01) for line in lines)
    model = load(run.path)
    assert model.config == run.config.model
    score = evaluate_checkpoint(run.path, device="cpu")
    assert score.active_experts == 2.0
    assert score.total.loss == pytest.approx(run.valid_loss, rel=1e-4)
    assert score.total.bits_per_character > 0
