"""Facts about one optimizer step on a small model."""

import pytest
import torch
from torch import Tensor

from remoe.data import Batch
from remoe.model import ReMoEForCausalLM
from remoe.moe.routers.relu import ReLURouter
from remoe.training.micro_batch import split
from remoe.training.step import Stepper

POST_NORM = {"block": "post_norm", "dropout": 0.3, "attention_span": 8, "num_kv_heads": 2}


def stepper_of(config, **sections) -> Stepper:
    built = config(**{**sections, "model": {"vocab_size": 256} | sections.get("model", {})})
    return Stepper(built, ReMoEForCausalLM(built.model, seed=1), torch.device("cpu"))


def state_of(stepper: Stepper) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in stepper.tensors().items()}


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("router", ["relu", "topk"])
def test_micro_batches_of_unequal_label_counts_give_the_whole_batches_lm_gradient(config, batch, size, router):
    gradients = []
    for micro_batch_size in (4, size):
        stepper = stepper_of(
            config,
            model={"router": router},
            train={"micro_batch_size": micro_batch_size},
            losses={"load_balancing_coef": 0.0},
            optimizer={"clip": 0.0},
        )
        values = stepper.run(batch, 1)
        gradients.append([p.grad for p in stepper.model.parameters()] + [values["lm_loss"]])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=2e-4, atol=1e-7)


def test_counts_of_a_step_do_not_depend_on_micro_batches(config, batch):
    whole, parts = (stepper_of(config, train={"micro_batch_size": size}).run(batch, 1) for size in (4, 1))
    for name in ("active", "total", "tokens", "without_expert", "idle_experts", "max_tokens"):
        assert torch.equal(whole[name], parts[name]), name
    assert whole["tokens"].tolist() == [32, 32]


def test_plain_l1_of_a_step_does_not_depend_on_micro_batches(config, batch):
    whole, parts = (
        stepper_of(config, train={"micro_batch_size": size}, sparsity={"load_balanced": False}).run(batch, 1)
        for size in (4, 2)
    )
    torch.testing.assert_close(parts["sparsity_l1"], whole["sparsity_l1"])


def test_loss_is_lm_loss_plus_coefficient_times_the_mean_l1_over_layers(config, batch):
    values = stepper_of(config, sparsity={"init": 0.5}).run(batch, 1)
    assert float(values["loss"]) == pytest.approx(
        float(values["lm_loss"] + 0.5 * values["sparsity_l1"].mean()), rel=1e-6
    )


def test_released_mode_adds_the_sum_over_layers(config, batch):
    values = stepper_of(config, sparsity={"init": 0.5, "mode": "released"}).run(batch, 1)
    assert float(values["loss"]) == pytest.approx(
        float(values["lm_loss"] + 0.5 * values["sparsity_l1"].sum()), rel=1e-6
    )


def test_the_coefficient_moves_once_a_step_and_metrics_have_the_one_used(config, batch):
    stepper = stepper_of(config, sparsity={"init": 1e-3}, train={"micro_batch_size": 1})
    values = stepper.run(batch, 1)
    sparsity = 1 - int(values["active"].sum()) / int(values["total"].sum())
    assert sparsity < 0.75  # below the target: the coefficient must grow
    assert float(values["sparsity_coef"]) == pytest.approx(1e-3)
    assert float(stepper.controller.coef) == pytest.approx(1.2e-3)


def test_one_coefficient_a_layer_moves_by_that_layers_counts(config, batch):
    stepper = stepper_of(config, sparsity={"init": 1e-3, "per_layer": True})
    with torch.no_grad():
        stepper.routers[1].weight.zero_()  # no gate of the second layer opens: sparsity 1
    stepper.run(batch, 1)
    assert stepper.controller.coef.tolist() == pytest.approx([1.2e-3, 1e-3 / 1.2])


def test_a_step_that_is_not_finite_leaves_everything_alone_and_is_counted(config, batch):
    stepper = stepper_of(config)
    stepper.run(batch, 1)
    state = state_of(stepper)
    with torch.no_grad():
        saved = stepper.model.lm_head.weight[0, 0].clone()
        stepper.model.lm_head.weight[0, 0] = float("nan")
    values = stepper.run(batch, 2)
    with torch.no_grad():
        stepper.model.lm_head.weight[0, 0] = saved
    assert differing(state, state_of(stepper)) == {"progress.skipped", "progress.skipped_in_a_row"}
    assert not values["loss"].isfinite()
    assert (int(stepper.skipped), int(stepper.skipped_in_a_row)) == (1, 1)
    stepper.run(batch, 3)
    assert (int(stepper.skipped), int(stepper.skipped_in_a_row)) == (1, 0)


def test_previous_loads_start_with_the_micro_batchs_own_and_then_lag_one_step(config, batch):
    lagging = stepper_of(config, sparsity={"loads": "previous_step"})
    current = stepper_of(config)
    first = lagging.run(batch, 1)
    assert torch.equal(first["sparsity_l1"], current.run(batch, 1)["sparsity_l1"])
    loads_LE = lagging.loads_LE.clone()
    other = Batch(batch.labels_BS.clamp(min=0), *batch[1:])
    expected = lagging.model(other.tokens_BS).routings
    terms = lagging.objective.terms(expected, loads_LE)
    torch.testing.assert_close(lagging.run(other, 2)["sparsity_l1"], terms["sparsity_l1"].detach())


def test_released_mode_never_uses_previous_loads(config):
    assert stepper_of(config, sparsity={"loads": "previous_step", "mode": "released"}).loads_LE is None


@pytest.mark.parametrize("model", [{}, {"router": "sparsemixer"}, {"router": "recurrent_relu"}, POST_NORM], ids=str)
@pytest.mark.parametrize("mode", [True, "full", "selective"])
def test_activation_checkpointing_changes_neither_counts_nor_gradients(config, batch, mode, model):
    results = []
    for given in ("none", mode):
        torch.manual_seed(0)
        stepper = stepper_of(config, train={"activation_checkpointing": given}, model=model)
        values = stepper.run(batch, 1)
        results.append([p.grad for p in stepper.model.parameters() if p.grad is not None] + list(values.values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bf16_keeps_fp32_weights_and_comes_close_to_fp32(config, batch):
    exact, rounded = (stepper_of(config, train={"precision": precision}) for precision in ("fp32", "bf16"))
    losses = [float(stepper.run(batch, 1)["lm_loss"]) for stepper in (exact, rounded)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert {weight.dtype for weight in rounded.weights.values()} == {torch.float32}


def test_a_dense_model_trains_without_routing_values(config, batch):
    stepper = stepper_of(config, model={"moe_layers": "none"})
    values = stepper.run(batch, 1)
    assert stepper.controller is None
    assert set(values) == {"loss", "lm_loss", "grad_norm", "skipped", "skipped_in_a_row"}
    assert torch.equal(values["loss"], values["lm_loss"])


def test_top_k_routers_have_load_balancing_and_no_controller(config, batch):
    stepper = stepper_of(config, model={"router": "topk"}, losses={"router_z_coef": 0.1})
    values = stepper.run(batch, 1)
    expected = values["lm_loss"] + 0.01 * values["load_balancing"].sum() + 0.1 * values["router_z"].sum()
    assert stepper.controller is None
    assert float(values["loss"]) == pytest.approx(float(expected), rel=1e-6)


def test_gradients_are_clipped_to_the_given_norm_and_the_norm_before_is_reported(config, batch):
    stepper = stepper_of(config, optimizer={"clip": 0.01})
    norm = stepper.run(batch, 1)["grad_norm"]
    clipped = torch.nn.utils.get_total_norm([p.grad for p in stepper.model.parameters()])
    assert float(norm) > 0.1
    assert float(clipped) == pytest.approx(0.01, rel=1e-3)


def test_tied_embeddings_are_saved_once(config):
    names = stepper_of(config, model={"tie_embeddings": True}).tensors()
    assert not any("lm_head" in name for name in names)


def test_split_keeps_rows_in_order(batch):
    parts = list(split(batch, 1))
    assert len(parts) == 4
    assert torch.equal(torch.cat([part.labels_BS for part in parts]), batch.labels_BS)


class CountingRouter(ReLURouter):
    """A router with a running state."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.register_buffer("seen_E", torch.zeros(4, dtype=torch.int64))

    def after_step(self, tokens_per_expert_E: Tensor, step: int) -> None:
        self.seen_E += tokens_per_expert_E


def test_a_routers_running_state_follows_each_step_that_counts(config, batch):
    stepper = stepper_of(config)
    router = CountingRouter(16, 4, 1)
    router.weight = stepper.routers[0].weight
    layer = stepper.model.model.layers[0].mlp
    layer.router = stepper.routers[0] = router
    active = int(stepper.run(batch, 1)["active"][0])
    assert int(router.seen_E.sum()) == active > 0
    with torch.no_grad():
        stepper.model.lm_head.weight[0, 0] = float("nan")
    stepper.run(batch, 2)
    assert int(router.seen_E.sum()) == active
    assert "model.model.layers.0.mlp.router.seen_E" in stepper.tensors()


@pytest.mark.slow
def test_compiled_training_matches_eager(config, batch):
    eager, compiled = (stepper_of(config, train={"compile": on}) for on in (False, True))
    for step in (1, 2):
        values, others = eager.run(batch, step), compiled.run(batch, step)
        torch.testing.assert_close(others["loss"], values["loss"], rtol=1e-4, atol=1e-5)
