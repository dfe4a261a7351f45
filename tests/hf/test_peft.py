"""PEFT adapts the exported model: attention by its modules, routers and experts by their parameters."""

import math
from itertools import pairwise

import pytest
import torch

import remoe
from remoe import hf
from remoe.model.weights import save_model
from tests.hf.test_training import Rows

pytestmark = pytest.mark.heavy
peft = pytest.importorskip("peft", reason="peft is not installed")

ROUTERS = {
    "relu": ("relu", ["router.weight"]),
    "topk": ("topk", ["router.weight"]),
    "recurrent_relu": (
        {"name": "recurrent_relu", "state_size": 16},
        ["router.projector", "router.head", "router_cell.weight_ih", "router_cell.weight_hh"],
    ),
}
ATTENTION = ["q_proj", "v_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
each = pytest.mark.parametrize("router", ROUTERS)


def adapted(model, **settings):
    """With adapters that are not zero at the start."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    return peft.get_peft_model(model, config)


@torch.no_grad()
def logits_of(model, tokens_BS):
    return model.eval()(input_ids=tokens_BS).logits


@pytest.fixture
def saved(build, tmp_path):
    """A checkpoint of the model with a router."""

    def save(router="relu"):
        save_model(build(router=ROUTERS[router][0]), tmp_path / "base")
        return tmp_path / "base"

    return save


@pytest.fixture
def train(tmp_path):
    """Train adapters of attention with the Trainer: the model and its log."""
    import transformers

    def run(folder, **settings):
        model = adapted(hf.ReMoEForCausalLM.from_pretrained(folder), target_modules=ATTENTION)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "trainer"), max_steps=3, per_device_train_batch_size=2, learning_rate=0.02,
            report_to=[], logging_steps=1, disable_tqdm=True, use_cpu=True, save_strategy="no", **settings,
        )  # fmt: skip
        callback = hf.SparsityCallback(init=0.05, multiplier=1.5)
        trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback])
        trainer.train()
        return model, [entry for entry in trainer.state.log_history if "loss" in entry]

    return run


relu_gated = pytest.mark.parametrize("router", ["relu", "recurrent_relu"])


@relu_gated
def test_the_trainer_changes_adapters_alone_and_the_callback_steers_the_model_inside(saved, train, router):
    folder = saved(router)
    start = adapted(hf.ReMoEForCausalLM.from_pretrained(folder), target_modules=ATTENTION).state_dict()
    model, logs = train(folder)
    changed = {name for name, value in model.state_dict().items() if not value.equal(start[name])}
    assert changed == {name for name in start if "lora_" in name}
    coefs = [entry["sparsity_coef"] for entry in logs]
    steps = [abs(math.log(after / before)) for before, after in pairwise([0.05, *coefs])]
    assert steps == pytest.approx([math.log(1.5)] * 3)
    inner = model.get_base_model()
    assert float(inner.sparsity_coef) == pytest.approx(coefs[-1])  # what its loss is weighed by
    assert inner.config.sparsity_coef == pytest.approx(coefs[-1])


@relu_gated
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_blocks_that_are_computed_twice_train_alike_and_count_once(saved, train, router, use_reentrant):
    folder = saved(router)
    recompute = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    (_, plain), (_, logs) = train(folder), train(folder, **recompute)
    for key in ("loss", "sparsity", "sparsity_coef"):
        assert [entry[key] for entry in logs] == pytest.approx([entry[key] for entry in plain], rel=1e-6)


@relu_gated
def test_saved_adapters_come_back_and_merge_into_a_model_that_remoe_loads(saved, train, tokens_BS, tmp_path, router):
    folder = saved(router)
    base = hf.ReMoEForCausalLM.from_pretrained(folder)
    before = logits_of(base, tokens_BS)
    model, _ = train(folder)
    logits = logits_of(model, tokens_BS)
    assert not torch.allclose(logits, before, atol=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert logits_of(again, tokens_BS).equal(logits)
    assert_merges(again, logits, tokens_BS, tmp_path / "merged")


def assert_merges(model, logits, tokens_BS, folder):
    merged = model.merge_and_unload()
    merged.save_pretrained(folder)
    assert (folder / "modeling_remoe.py").is_file()
    native = remoe.load(folder)
    with torch.no_grad():
        torch.testing.assert_close(native(tokens_BS).logits, logits, rtol=1e-4, atol=1e-4)


@each
@pytest.mark.parametrize("experts", ["remoe", "eager", "grouped_mm"])
def test_adapters_of_routers_and_experts_act_and_learn_as_parts_of_their_weights(
    saved, tokens_BS, tmp_path, router, experts
):
    folder, names = saved(router), [*EXPERTS, *ROUTERS[router][1]]
    base = hf.ReMoEForCausalLM.from_pretrained(folder, experts_implementation=experts)
    before = logits_of(base, tokens_BS)
    adapted_weights = [name for name, _ in base.named_parameters() if name.endswith(tuple(names))]
    model = adapted(base, target_modules=[], target_parameters=names)
    model.train()(input_ids=tokens_BS, labels=tokens_BS).loss.backward()
    adapters = {name: value for name, value in model.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * len(adapted_weights)
    assert all(value.grad is not None and value.grad.any() for value in adapters.values())
    logits = logits_of(model, tokens_BS)
    assert not torch.allclose(logits, before, atol=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    fresh = hf.ReMoEForCausalLM.from_pretrained(folder, experts_implementation=experts)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(again, tokens_BS), logits, rtol=1e-5, atol=1e-5)
    assert_merges(again, logits, tokens_BS, tmp_path / "merged")


def test_whole_routers_train_beside_adapters_where_modules_to_save_names_them(saved, tokens_BS, tmp_path):
    folder = saved()
    base = hf.ReMoEForCausalLM.from_pretrained(folder)
    model = adapted(base, target_modules=["q_proj"], modules_to_save=["router"])
    model.train()(input_ids=tokens_BS, labels=tokens_BS).loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name and parameter.requires_grad:
                assert parameter.grad.any()
                parameter -= 0.1 * parameter.grad
    model.save_pretrained(tmp_path / "adapter")
    fresh = hf.ReMoEForCausalLM.from_pretrained(folder)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert logits_of(again, tokens_BS).equal(logits_of(model, tokens_BS))


@pytest.mark.parametrize("name", ["router", "experts"])
def test_routers_and_experts_are_no_target_modules(saved, name):
    folder = saved()
    with pytest.raises(ValueError, match="is not supported"):
        adapted(hf.ReMoEForCausalLM.from_pretrained(folder), target_modules=[name])
