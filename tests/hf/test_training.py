"""Trainer and accelerate train the model as the native formulas do, and the callback steers its sparsity."""

import math

import pytest
import torch
from torch import nn

from remoe import hf
from remoe.errors import ConfigError
from remoe.moe import SparsityController, losses

pytestmark = pytest.mark.heavy
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

LR, STEPS, MICRO_BATCHES = 0.1, 4, 2


class Rows(torch.utils.data.Dataset):
    """Random texts of one length."""

    def __init__(self, count: int = STEPS * MICRO_BATCHES * 2) -> None:
        self.tokens = torch.randint(0, 61, (count, 12), generator=torch.Generator().manual_seed(2))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


@pytest.fixture
def train(tmp_path):
    """Run the Trainer over the rows in order, with plain SGD."""
    import transformers

    def run(model, *callbacks, resume=None, **settings):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "trainer"), per_device_train_batch_size=2, learning_rate=LR, report_to=[],
            gradient_accumulation_steps=MICRO_BATCHES, max_grad_norm=0, logging_steps=1, lr_scheduler_type="constant",
            save_steps=2, disable_tqdm=True, use_cpu=True, optim="sgd", train_sampling_strategy="sequential",
            **{"num_train_epochs": 1, "save_strategy": "steps"} | settings,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def trained_natively(model, controller):
    """The same steps by hand: each micro-batch's terms weigh as much as its share of the tokens."""
    model.train()
    coefs, sparsities = [], []
    for step in Rows().tokens.split(2 * MICRO_BATCHES):
        active = total = 0
        for tokens_BS in step.split(2):
            output = model(tokens_BS)
            lm_loss = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())
            routings = [routing for routing in output.routings if routing is not None]
            l1 = torch.stack([losses.sparsity_l1(routing, 1) for routing in routings]).mean()
            ((lm_loss + controller.coef * l1) / MICRO_BATCHES).backward()
            active += sum(int(routing.routing_map_TE.sum()) for routing in routings)
            total += sum(routing.routing_map_TE.numel() for routing in routings)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= LR * parameter.grad
                parameter.grad = None
        controller.update(active, total)
        coefs.append(float(controller.coef))
        sparsities.append(1 - active / total)
    return coefs, sparsities


@pytest.mark.parametrize("router", ["relu", "recurrent_relu"])
def test_trainer_takes_the_steps_of_native_training_with_the_same_coefficients(build, train, router):
    model = build(router=router)
    coefs, sparsities = trained_natively(model, SparsityController(1, 4, init=0.05, multiplier=1.5))
    other = hf.from_native(build(router=router))
    trainer = train(other, hf.SparsityCallback(init=0.05, multiplier=1.5))
    logs = [entry for entry in trainer.state.log_history if "sparsity_coef" in entry]
    assert [entry["sparsity_coef"] for entry in logs] == coefs
    assert [entry["sparsity"] for entry in logs] == pytest.approx(sparsities, abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), parameter, rtol=1e-4, atol=1e-5, msg=name)
    assert other.config.sparsity_coef == pytest.approx(coefs[-1], rel=1e-6)


def test_a_resumed_training_ends_with_the_same_weights_and_coefficient(build, train, tmp_path):
    whole = train(hf.from_native(build()), hf.SparsityCallback(init=0.05, average=0.5))
    resumed = hf.from_native(build())
    callback = hf.SparsityCallback(init=0.05, average=0.5)
    train(resumed, callback, resume=str(tmp_path / "trainer" / "checkpoint-2"))
    assert all(map(torch.equal, whole.model.parameters(), resumed.parameters()))
    assert resumed.config.sparsity_coef == whole.model.config.sparsity_coef
    assert callback.tracker.controller.distance_weight == 1 - 0.5**STEPS


def test_a_saved_model_goes_on_with_its_last_coefficient(build, train, tmp_path):
    trainer = train(hf.from_native(build()), hf.SparsityCallback(init=0.05))
    trainer.save_model(str(tmp_path / "model"))
    loaded = hf.ReMoEForCausalLM.from_pretrained(tmp_path / "model")
    tracker = hf.SparsityTracker(loaded)
    assert float(tracker.controller.coef) == pytest.approx(trainer.model.config.sparsity_coef, rel=1e-6)


@pytest.mark.parametrize("router", ["relu", "topk", "recurrent_relu"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_blocks_that_are_computed_twice_train_alike_and_count_once(build, train, router, use_reentrant):
    def trained(**settings):
        callbacks = [] if router == "topk" else [hf.SparsityCallback(init=0.05)]
        trainer = train(hf.from_native(build(router=router)), *callbacks, save_strategy="no", **settings)
        keys = {"loss", "grad_norm", "sparsity", "sparsity_coef"}
        return trainer.model, [{key: log[key] for key in keys & log.keys()} for log in trainer.state.log_history]

    model, logs = trained()
    recompute = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    other, logs_of_other = trained(**recompute)
    assert other.is_gradient_checkpointing
    assert logs_of_other == [pytest.approx(log, rel=1e-5) for log in logs]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), parameter, rtol=1e-5, atol=1e-6, msg=name)


def test_the_trainer_evaluates_and_predicts_with_logits_alone(build, train):
    model = build()
    trainer = train(hf.from_native(model), num_train_epochs=0, save_strategy="no")
    tokens_BS = Rows(4).tokens
    predictions = trainer.predict(Rows(4))
    with torch.no_grad():
        logits_BSV = model(tokens_BS).logits
    lm_loss = nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())
    torch.testing.assert_close(torch.from_numpy(predictions.predictions), logits_BSV)
    assert predictions.metrics["test_loss"] == pytest.approx(lm_loss.item(), rel=1e-5)
    assert trainer.evaluate(Rows(4))["eval_loss"] == pytest.approx(lm_loss.item(), rel=1e-5)


def test_accelerate_trains_it_with_the_tracker(build):
    model = build()
    coefs, _ = trained_natively(model, SparsityController(1, 4, init=0.05))
    other = hf.from_native(build()).train()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=2)
    wrapped, optimizer, loader = accelerator.prepare(other, torch.optim.SGD(other.parameters(), lr=LR), loader)
    tracker = hf.SparsityTracker(wrapped, init=0.05)
    seen = []
    for batch in loader:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            tracker.step(skipped=optimizer.step_was_skipped)
            seen.append(float(tracker.controller.coef))
    assert seen == coefs
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), parameter, rtol=1e-4, atol=1e-5, msg=name)


def test_passes_that_train_nothing_are_not_counted_and_a_skipped_step_moves_nothing(build, tokens_BS):
    model = hf.from_native(build())
    tracker = hf.SparsityTracker(model, init=0.05)
    model.eval()(tokens_BS)
    with torch.no_grad():
        model.train()(tokens_BS)
    tracker.step()
    assert tracker.density_L is None
    model(tokens_BS)
    tracker.step(skipped=True)
    assert float(tracker.controller.coef) == pytest.approx(0.05)
    model(tokens_BS)
    tracker.step()
    assert abs(math.log(float(tracker.controller.coef) / 0.05)) == pytest.approx(math.log(1.2), rel=1e-5)


def test_one_coefficient_a_layer_weighs_each_layers_own_term(build, tokens_BS):
    model = hf.from_native(build()).train()
    tracker = hf.SparsityTracker(model, init=0.05, per_layer=True)
    model(tokens_BS)
    tracker.step()
    assert model.sparsity_coef.shape == (2,)
    terms_L = model.model(tokens_BS).aux_losses
    torch.testing.assert_close(model(tokens_BS).aux_loss, (model.sparsity_coef * terms_L).mean())


def test_the_callback_refuses_a_router_that_it_cannot_steer(build):
    with pytest.raises(ConfigError, match="is 'topk', must be relu or recurrent_relu"):
        hf.SparsityTracker(hf.from_native(build(router="topk")))
