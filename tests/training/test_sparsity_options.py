"""What users of ReLU routing ask for next, in whole steps and whole runs: held, spared, revived, resumed."""

import os
import shutil
import signal

import pytest
import torch

from remoe.errors import ConfigError
from remoe.model import ReMoEForCausalLM
from remoe.training import checkpoint, load, train
from remoe.training.schedule import has_decayed
from remoe.training.signals import RunStoppedError
from remoe.training.step import Stepper

OPTIONS = {
    "proportional": {"sparsity": {"rule": "proportional", "average": 0.5}},
    "dead band": {"sparsity": {"dead_band": 0.01, "average": 0.5}},
    "average per layer": {"sparsity": {"average": 0.9, "per_layer": True}},
    "revived": {"sparsity": {"density_floor": 0.9, "revival_coef": 0.1}},
    "held": {"sparsity": {"hold_below_lr": 0.5}},
    "normalized": {"model": {"router": {"name": "relu", "normalize": True}}},
}


def stepper_of(config, **sections) -> Stepper:
    built = config(**{**sections, "model": {"vocab_size": 256} | sections.get("model", {})})
    return Stepper(built, ReMoEForCausalLM(built.model, seed=1), torch.device("cpu"))


def starve(stepper: Stepper, layer: int) -> None:
    """Close every gate of a layer: all tokens have a part in common, and its router turns away from that.

    Only this layer's experts and router learn, so that nothing else opens its gates by accident.
    """
    with torch.no_grad():
        stepper.model.model.embed_tokens.weight[:, 0] = 1.0
        stepper.routers[layer].weight[:, 0] = -0.3
    for name, parameter in stepper.model.named_parameters():
        parameter.requires_grad_(f"layers.{layer}.mlp" in name)


def test_with_the_defaults_the_loss_has_no_other_term(config, batch):
    values = stepper_of(config, sparsity={"init": 0.5}).run(batch, 1)
    assert "revival" not in values
    expected = values["lm_loss"] + 0.5 * values["sparsity_l1"].mean()
    assert float(values["loss"]) == pytest.approx(float(expected), rel=1e-6)


def test_the_l1_term_spares_layers_below_the_floor(config, batch):
    plain = stepper_of(config, sparsity={"init": 0.5})
    spared = stepper_of(config, sparsity={"init": 0.5, "density_floor": 1.0})
    for stepper in (plain, spared):
        with torch.no_grad():  # two of four experts never open: density of half the gates that were open
            stepper.routers[1].weight[1:] = 0
            stepper.routers[1].weight[0] *= 0.01
    before, after = plain.run(batch, 1), spared.run(batch, 1)
    assert int(before["active"][1]) < int(before["tokens"][1])  # fewer than k = 1 a token
    assert torch.equal(before["sparsity_l1"], after["sparsity_l1"])
    expected = after["lm_loss"] + 0.5 * after["sparsity_l1"][0] / 2
    assert float(after["loss"]) == pytest.approx(float(expected), rel=1e-6)


def test_a_dead_layer_is_revived_in_training_and_only_with_the_option(config, batch):
    active = {}
    for coef in (0.0, 0.1):
        sparsity = {"init": 1e-3, "density_floor": 0.8, "revival_coef": coef}
        stepper = stepper_of(config, sparsity=sparsity, optimizer={"schedule": "constant", "lr": 0.005})
        starve(stepper, 1)
        values = [stepper.run(batch, step) for step in range(1, 61)]
        active[coef] = [int(line["active"][1]) / int(line["tokens"][1]) for line in values]  # the target is k = 1
    assert active[0.0] == [0] * 60
    assert active[0.1][:5] == [0] * 5
    assert sum(active[0.1][-20:]) / 20 >= 0.7  # the coefficient presses towards the floor, from above


def test_the_coefficient_is_held_once_the_learning_rate_has_decayed_and_not_in_the_warm_up(config):
    optimizer = config(optimizer={"warmup_steps": 4, "lr": 1.0, "min_lr": 0.0, "schedule": "linear"}).optimizer
    held = [has_decayed(optimizer, step, 10, 0.5) for step in range(1, 11)]
    assert held == [False] * 7 + [True] * 3
    assert not any(has_decayed(optimizer, step, 10, 0.0) for step in range(1, 11))


def test_a_held_coefficient_stays_for_the_rest_of_the_run(config, tmp_path):
    run = train(config(optimizer={"min_lr": 0.0}, sparsity={"hold_below_lr": 0.5}), root=tmp_path)
    coefs = [line["sparsity_coef"] for line in run.metrics()]
    assert len(set(coefs[:4])) == 4
    assert len(set(coefs[-2:])) == 1


def test_revival_is_in_the_metrics_where_it_is_on(config, tmp_path):
    on = train(config("on", sparsity={"revival_coef": 0.1}, train={"steps": 2}), root=tmp_path).metrics()[-1]
    off = train(config("off", train={"steps": 2}), root=tmp_path).metrics()[-1]
    assert on["revival"] == pytest.approx(sum(on["layers"]["revival"]))
    assert "revival" not in off


def test_the_moving_average_is_in_the_checkpoint(config, batch):
    stepper = stepper_of(config, sparsity={"average": 0.9})
    stepper.run(batch, 1)
    tensors = stepper.tensors()
    assert tensors["sparsity.distance_weight"].item() == pytest.approx(0.1)
    assert tensors["sparsity.distance_sum"].item() != 0
    assert not any("distance" in name for name in stepper_of(config).tensors())


@pytest.mark.parametrize("sections", OPTIONS.values(), ids=OPTIONS)
def test_a_stopped_and_resumed_run_is_bit_for_bit_the_whole_one(config, tmp_path, numbers, sections):
    whole = train(config("whole", **sections), root=tmp_path)
    parts_config = config("parts", **sections)
    original = Stepper.run

    def run_and_signal(stepper, batch, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(stepper, batch, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "run", run_and_signal)
        with pytest.raises(RunStoppedError):
            train(parts_config, root=tmp_path)
    parts = train(parts_config, root=tmp_path, resume=True)
    assert numbers(parts.metrics()) == numbers(whole.metrics())
    for name, tensor in load(whole.path).state_dict().items():
        assert torch.equal(tensor, load(parts.path).state_dict()[name]), name


def test_a_checkpoint_from_before_a_setting_existed_goes_on_with_its_default(config, tmp_path):
    run = train(config(train={"steps": 3}, optimizer={"schedule": "constant"}), root=tmp_path)
    last = checkpoint.read(checkpoint.paths(run.checkpoints)[-1])
    tensors = Stepper(run.config, ReMoEForCausalLM(run.config.model), torch.device("cpu")).tensors()
    tensors |= {"random.cpu": torch.get_rng_state()}
    last.load(tensors)
    del last.record["config"]["sparsity"]["rule"]
    shutil.rmtree(run.checkpoints)
    checkpoint.write(run.checkpoints, tensors, last.record)
    more = config(train={"steps": 4}, optimizer={"schedule": "constant"})
    assert [line["step"] for line in train(more, root=tmp_path, resume=True).metrics()] == [1, 2, 3, 4]
    changed = config(train={"steps": 4}, optimizer={"schedule": "constant"}, sparsity={"rule": "proportional"})
    with pytest.raises(ConfigError, match=r"sparsity\.rule is 'proportional', but .* was trained with 'sign'"):
        train(changed, root=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        ({"rule": "signum"}, "sparsity.rule is 'signum', must be one of sign, proportional"),
        ({"density_floor": 1.5}, r"sparsity.density_floor is 1.5, must be between 0.0 and 1.0"),
        ({"revival_coef": -1.0}, r"sparsity.revival_coef is -1.0, must be at least 0.0"),
        ({"hold_below_lr": 2.0}, r"sparsity.hold_below_lr is 2.0"),
        ({"mode": "released", "average": 0.5}, r"sparsity.mode is 'released', whose rule is the sign rule"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, sparsity, message):
    with pytest.raises(ConfigError, match=message):
        config(sparsity=sparsity)
