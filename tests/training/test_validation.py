"""Facts about validation losses and flips."""

import pytest
import torch
import torch.nn.functional as F

from remoe.data import Batch
from remoe.model import ReMoEConfig, ReMoEForCausalLM
from remoe.moe.stats import flip_rate
from remoe.training.flips import FlipMeter
from remoe.training.validation import evaluate, token_mask

SETTINGS = {"vocab_size": 256, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
SETTINGS |= {"intermediate_size": 16, "num_experts": 4, "init_std": 0.3}


@pytest.fixture
def model() -> ReMoEForCausalLM:
    return ReMoEForCausalLM(ReMoEConfig(**SETTINGS), seed=2)


def test_losses_are_means_over_labels_as_a_whole_and_per_domain(model, batch):
    batch = batch._replace(domain_BS=torch.tensor([[0], [2], [2], [0]]).expand(4, 8))
    result = evaluate(model, [batch], ["a", "never seen", "c"])
    with torch.no_grad():
        logits_BSV = model(batch.tokens_BS, token_mask(batch)).logits
    losses_BS = F.cross_entropy(logits_BSV.transpose(1, 2), batch.labels_BS, reduction="none")
    counted_BS = batch.labels_BS != -100
    assert result["loss"] == pytest.approx(float(losses_BS[counted_BS].mean()), rel=1e-6)
    assert result["per_domain"].keys() == {"a", "c"}
    rows = losses_BS[[0, 3]][counted_BS[[0, 3]]]
    assert result["per_domain"]["a"] == pytest.approx(float(rows.mean()), rel=1e-6)
    assert result["labels"] == {"a": 13, "c": 16}


def test_losses_do_not_depend_on_how_text_is_cut_into_batches(model, batch):
    parts = [Batch(*rows) for rows in zip(*(values.split(1) for values in batch), strict=True)]
    whole, cut = evaluate(model, [batch], ["a"]), evaluate(model, parts, ["a"])
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert cut["active_experts"] == whole["active_experts"]


def test_the_mode_before_comes_back_and_no_gradient_is_left(model, batch):
    model.train()
    evaluate(model, [batch], ["a"])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_padding_is_not_counted_as_tokens_with_experts(model, batch):
    # row 0 has its last label at place 4: places 6 and 7 are padding
    mask_BS = token_mask(batch)
    assert mask_BS.sum(1).tolist() == [6, 8, 8, 8]
    assert token_mask(Batch(*(values[1:] for values in batch))) is None
    routings = model(batch.tokens_BS, mask_BS).routings
    active = sum(int(routing.routing_map_TE.sum()) for routing in routings)
    assert evaluate(model, [batch], ["a"])["active_experts"] == active / (2 * 30)


def test_a_dense_model_has_no_active_experts(batch):
    dense = ReMoEForCausalLM(ReMoEConfig(**SETTINGS | {"moe_layers": "none"}))
    assert evaluate(dense, [batch], ["a"])["active_experts"] is None


def test_flips_are_counted_between_the_two_sides_of_a_step(model, batch):
    meter = FlipMeter(model, batch, document_mask=False)
    meter.before_step()
    assert float(meter.after_step()["flip_rate"]) == 0.0
    before = [r.routing_map_TE.clone() for r in model(batch.tokens_BS, token_mask(batch)).routings]
    with torch.no_grad():
        model.model.layers[0].mlp.router.weight.neg_()
    values = meter.after_step()
    after = [r.routing_map_TE for r in model(batch.tokens_BS, token_mask(batch)).routings]
    expected = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True)) / (2 * 32 * 4)
    assert float(values["flip_rate"]) == pytest.approx(expected)
    assert expected > 0.3
    assert float(values["flip_count"]) == pytest.approx(4 * expected)


def test_flips_are_measured_in_the_runs_precision(model, batch):
    meter = FlipMeter(model, batch, document_mask=False, precision="bf16")
    meter.before_step()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        routings = model(batch.tokens_BS, token_mask(batch)).routings
    assert all(torch.equal(a, r.routing_map_TE) for a, r in zip(meter._before, routings, strict=True))


def test_flip_rate_of_the_specs_maps():
    # TV5
    first = [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 1]], [[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]
    second = [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 1]], [[0, 1, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]
    maps = [[torch.tensor(layer).bool() for layer in layers] for layers in (first, second)]
    assert float(flip_rate(*maps)) == pytest.approx(0.2916666666666667)
    layers = [float(flip_rate([a], [b])) for a, b in zip(*maps, strict=True)]
    assert layers == pytest.approx([0.25, 1 / 3])
