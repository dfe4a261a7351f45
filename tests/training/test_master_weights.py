"""Facts about bf16 training: matrices in bf16, their fp32 weights beside the model."""

import pytest
import torch
from torch import nn

from remoe.config import from_dict, to_dict
from remoe.model import ReMoEForCausalLM
from remoe.training import TrainConfig, checkpoint, load, step, train
from remoe.training.step import Stepper
from tests.training.test_loop import train_until

BF16 = {"train": {"precision": "bf16", "micro_batch_size": 2}}
POST_NORM = {"block": "post_norm", "dropout": 0.0, "attention_span": 8, "num_kv_heads": 2}
MODELS = [
    {}, {"router": "topk"}, {"router": "recurrent_relu"}, {"router": "lory"}, {"router": "mlp"},
    {"moe_layers": "none"}, {"tie_embeddings": True}, POST_NORM,
]  # fmt: skip


class WithoutMasters:
    """Plain autocast over fp32 weights."""

    def __init__(self, model: nn.Module) -> None:
        pass

    def named_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return dict(model.named_parameters())

    def update_model(self) -> None:
        pass

    def zero_sums(self) -> None:
        pass

    def complete_gradients(self) -> None:
        pass


def stepper_of(config, model, **train_changes) -> Stepper:
    built = config(train=BF16["train"] | train_changes, model={"vocab_size": 256} | model)
    return Stepper(built, ReMoEForCausalLM(built.model, seed=1), torch.device("cpu"))


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_steps_are_bit_for_bit_those_of_autocast_over_fp32_weights(config, batch, monkeypatch, model, checkpointing):
    ours = stepper_of(config, model, activation_checkpointing=checkpointing)
    monkeypatch.setattr(step, "MasterWeights", WithoutMasters)
    plain = stepper_of(config, model, activation_checkpointing=checkpointing)
    for number in (1, 2, 3):
        values, others = ours.run(batch, number), plain.run(batch, number)
        assert [name for name in others if not torch.equal(values[name], others[name])] == []
    state, expected = ours.tensors(), plain.tensors()
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


def test_projections_and_experts_are_bf16_and_all_else_and_every_checkpoint_is_fp32(config):
    stepper = stepper_of(config, {})
    rounded = {name for name, parameter in stepper.model.named_parameters() if parameter.dtype == torch.bfloat16}
    layers = {f"model.layers.{layer}.{part}" for layer in (0, 1) for part in (
        "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
    )}  # fmt: skip
    assert rounded == layers | {"lm_head.weight"}
    floats = {name: value.dtype for name, value in stepper.tensors().items() if value.is_floating_point()}
    assert {dtype for name, dtype in floats.items() if name.startswith(("model.", "optimizer."))} == {torch.float32}


def test_the_model_follows_small_updates_that_bf16_would_lose(config, batch):
    stepper = stepper_of(config, {})
    name = "lm_head.weight"
    before, rounded = stepper.weights[name].clone(), stepper.model.lm_head.weight.clone()
    stepper.run(batch, 1)
    moved = stepper.weights[name] - before
    assert (moved != 0).all()
    assert torch.equal(stepper.model.lm_head.weight, stepper.weights[name].to(torch.bfloat16))
    assert (stepper.model.lm_head.weight == rounded).any()  # too small a step for bf16, kept in fp32


def test_inside_in_fp32_the_model_is_the_fp32_one(config, batch):
    stepper = stepper_of(config, {})
    exact = ReMoEForCausalLM(stepper.config.model, seed=1)
    with stepper.masters.in_fp32(), torch.no_grad():
        assert torch.equal(stepper.model(batch.tokens_BS).logits, exact(batch.tokens_BS).logits)
    assert stepper.model.lm_head.weight.dtype == torch.bfloat16
    stepper.run(batch, 1)


def test_a_bf16_run_resumes_bit_for_bit_and_loads_in_fp32(config, tmp_path, numbers):
    whole = train(config("whole", **BF16), root=tmp_path)
    train_until(config("parts", **BF16), tmp_path, 2)
    parts = train(config("parts", **BF16), root=tmp_path, resume=True)
    assert numbers(parts.metrics()) == numbers(whole.metrics())
    for name, tensor in load(whole.path).state_dict().items():
        assert torch.equal(tensor, load(parts.path).state_dict()[name]), name
        assert tensor.dtype != torch.bfloat16


def test_a_checkpoint_of_a_bf16_run_has_the_tensors_of_an_fp32_one(config, tmp_path):
    names = []
    for precision in ("fp32", "bf16"):
        values = to_dict(config(precision, train={"precision": precision, "steps": 1}))
        run = train(from_dict(TrainConfig, values), root=tmp_path)
        found, _ = checkpoint.newest(run.checkpoints)
        index = [line for path in found.path.glob("*.safetensors") for line in header(path)]
        names.append(sorted(index))
    assert names[0] == names[1]


def header(path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return [f"{name} {file.get_tensor(name).dtype}" for name in file.keys()]  # noqa: SIM118


def test_experts_add_their_gradients_to_sums_that_stay_where_they_are(config, batch):
    stepper = stepper_of(config, {})
    experts = stepper.layers[0].experts
    places = [gradient_sum.data_ptr() for gradient_sum in experts.gradient_sums]
    for number in (1, 2):
        stepper.run(batch, number)
        assert experts.gate_up_proj.grad is None
        assert all(gradient_sum.abs().sum() > 0 for gradient_sum in experts.gradient_sums)
        assert stepper.weights["model.layers.0.mlp.experts.gate_up_proj"].grad is experts.gradient_sums[0]
    assert [gradient_sum.data_ptr() for gradient_sum in experts.gradient_sums] == places
