"""Facts about what the trainer tells routers that have a running state of their own."""

import numpy as np
import pytest
import torch

from remoe.data import open_corpus
from remoe.data.token_counts import token_counts
from remoe.eval import evaluate_checkpoint
from remoe.moe.routers.hash import balanced_table
from remoe.training import load, train
from tests.training.conftest import MODEL

EXPERT_CHOICE = {"router": {"name": "expert_choice", "window": 4}}
ROUTERS = {
    "hash": {"router": {"name": "hash", "table": "balanced", "per_layer": True}},
    "expert_choice": EXPERT_CHOICE,
    "sparsemixer": {"router": {"name": "sparsemixer", "jitter": 0.3}},
    "lory": {"router": {"name": "lory", "segment_length": 4}},
    "warm_up": {"router": {"name": "topk", "warmup_steps": 3}},
}


def routers_of(run):
    return [layer.mlp.router for layer in load(run.path).model.layers]


def test_a_balanced_hash_router_trains_on_the_counts_of_its_training_text(config, tmp_path):
    run = train(config(model=MODEL | {"router": {"name": "hash", "table": "balanced"}}), root=tmp_path)
    corpus = open_corpus(run.config.data)
    counts_V = torch.from_numpy(token_counts(corpus.train, run.config.model.vocab_size))
    assert counts_V.sum() == corpus.train.num_tokens
    for router in routers_of(run):
        assert torch.equal(router.table, balanced_table(counts_V, 4))


@pytest.mark.parametrize("name", ROUTERS)
def test_a_resumed_run_goes_on_bit_for_bit(config, numbers, tmp_path, name):
    def run(folder, steps):
        settings = {"optimizer": {"schedule": "constant"}, "train": {"steps": steps}}
        return train(config(folder, model=MODEL | ROUTERS[name], **settings), resume=True, root=tmp_path)

    whole = numbers(run("whole", 6).metrics())
    run("cut", 2)
    cut = numbers(run("cut", 6).metrics())
    assert [line["step"] for line in cut] == [1, 2, 3, 4, 5, 6]
    assert cut[2:] == whole[2:]


def test_both_evaluations_of_expert_choice_are_in_the_metrics_and_in_eval(config, tmp_path):
    run = train(config(model=MODEL | EXPERT_CHOICE), root=tmp_path)
    line = run.metrics()[-1]
    assert np.isfinite(line["valid_loss"])
    assert line["valid_loss"] != line["valid_loss_causal"]
    result = evaluate_checkpoint(run.path, batch_size=4, device="cpu")  # leaky: the group is what counts
    assert result.total.loss == pytest.approx(line["valid_loss"], rel=1e-6)
    assert result.others["causal"].total.loss == pytest.approx(line["valid_loss_causal"], rel=1e-6)
    assert result.others["causal"].active_experts != result.active_experts
    assert all(int(router.num_observed) == 6 for router in routers_of(run))


def test_the_evaluation_that_the_config_asks_for_is_the_one_called_valid_loss(config, tmp_path):
    leaky = train(config("leaky", model=MODEL | EXPERT_CHOICE), root=tmp_path).metrics()[-1]
    causal = {"router": EXPERT_CHOICE["router"] | {"evaluation": "causal"}}
    line = train(config("causal", model=MODEL | causal), root=tmp_path).metrics()[-1]
    assert (line["valid_loss"], line["valid_loss_leaky"]) == (leaky["valid_loss_causal"], leaky["valid_loss"])


def test_thresholds_see_every_micro_batch_and_no_recomputation_twice(config, tmp_path):
    def thresholds(name, **loop):
        run = train(config(name, model=MODEL | EXPERT_CHOICE, train={"steps": 1, **loop}), root=tmp_path)
        return [router.thresholds for router in routers_of(run)]

    plain = thresholds("plain", micro_batch_size=2)
    again = thresholds("again", micro_batch_size=2, activation_checkpointing=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_the_warm_up_shows_in_the_experts_a_token_uses(config, tmp_path):
    lines = train(config(model=MODEL | ROUTERS["warm_up"]), root=tmp_path).metrics()
    assert [line["active_experts"] for line in lines] == [3, 3, 3, 1, 1, 1]
    assert all(0.9 < value < 4 for line in lines for value in line["layers"]["load_balancing"])
