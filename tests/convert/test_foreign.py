"""Models of transformers with their gates swapped: close to the source at once, and the same after saving."""

import json
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.heavy
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from remoe.convert.foreign import load_source, save_converted, swap_gates, with_relu_gates  # noqa: E402
from remoe.convert.modeling_relu_moe import FAMILIES, topk_gates  # noqa: E402
from remoe.convert.relu_gate import ReLUGate  # noqa: E402
from remoe.errors import CheckpointError, ConfigError  # noqa: E402

EVERY = pytest.mark.parametrize("model_type", FAMILIES)
TOKENS = torch.arange(3, 59).view(2, 28)


@EVERY
def test_a_converted_model_uses_k_experts_and_stays_close(model_type, build_family, text):
    source = build_family(model_type)
    converted, report = swap_gates(source, text)
    assert (report.source, report.target, report.top_k) == (model_type, f"relu_{model_type}", 2)
    assert sum(report.active_experts) / len(report.active_experts) == pytest.approx(2, rel=0.15)
    assert min(report.overlap) > 0.6  # by chance: 2 of 8
    assert report.agreement.loss_after < report.agreement.loss_before + 0.3
    assert 0 < report.agreement.kl_divergence < 0.3
    out = converted(TOKENS)
    assert out.tokens_per_expert.shape == (len(report.overlap), 8)
    assert int(out.num_tokens) == TOKENS.numel()


@EVERY
def test_all_but_the_gates_is_the_sources(model_type, build_family, text):
    source = build_family(model_type)
    converted, _ = swap_gates(source, text)
    gates = {name for name, module in source.named_modules() if module in topk_gates(source)}
    own, other = converted.state_dict(), source.state_dict()
    same = {name for name in own.keys() & other.keys() if torch.equal(own[name], other[name])}
    added = {f"{gate}.{part}" for gate in gates for part in ("bias", "scale")}
    assert own.keys() - other.keys() == added
    assert own.keys() - same == added | {f"{gate}.weight" for gate in gates}
    folded = {f"{gate}.e_score_correction_bias" for gate in gates} if model_type == "deepseek_v3" else set()
    assert other.keys() - own.keys() == folded


@EVERY
def test_a_saved_model_loads_without_remoe_and_is_the_same(model_type, build_family, text, tmp_path):
    converted, _ = swap_gates(build_family(model_type), text)
    converted.set_thresholds([0.05] * len(converted.gates))
    save_converted(converted, tmp_path, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == f"relu_{model_type}"
    torch.save((TOKENS, converted(TOKENS).logits), tmp_path / "expected.pt")
    script = """
import sys, torch
sys.modules["remoe"] = None
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert [gate.threshold for gate in model.gates] == [0.05] * len(model.gates)
tokens, expected = torch.load(sys.argv[1] + "/expected.pt")
torch.testing.assert_close(model.eval()(tokens).logits, expected, rtol=0, atol=2e-5)
model.generate(tokens[:, :5], max_new_tokens=3)
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_source_is_as_it_was(build_family, text):
    source = build_family("olmoe")
    before = source(TOKENS).logits
    swap_gates(source, text)
    assert torch.equal(source(TOKENS).logits, before)


def test_the_density_dial_closes_experts(build_family, text):
    converted, _ = swap_gates(build_family("olmoe"), text)
    trained = converted(TOKENS).tokens_per_expert.sum()
    converted.set_thresholds(0.1)
    assert 0 < converted(TOKENS).tokens_per_expert.sum() < trained
    with pytest.raises(ValueError, match="thresholds has 2 numbers"):
        converted.set_thresholds([0.1, 0.2])


def test_the_loss_carries_the_l1_term_by_hand(build_family, text):
    converted, _ = swap_gates(build_family("olmoe"), text)
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    plain = converted(TOKENS, attention_mask=mask, labels=TOKENS)
    converted.sparsity_coef = 0.5
    out = converted(TOKENS, attention_mask=mask, labels=TOKENS)
    terms = []
    hooks = [gate.register_forward_hook(lambda _, __, output: terms.append(output[0])) for gate in converted.gates]
    converted(TOKENS, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    counted = mask.flatten().bool()
    by_hand = 0.0
    for logits_TE in terms:
        gates_TE = logits_TE[counted].relu()
        load_E = (gates_TE > 0).float().mean(0) * 8 / 2
        by_hand += float((load_E * gates_TE.mean(0)).sum().detach()) / 3
    assert float(out.loss - plain.loss) == pytest.approx(0.5 * by_hand, rel=1e-4)
    assert int(out.num_tokens) == 52
    out.loss.backward()
    assert all(gate.weight.grad.abs().sum() > 0 and gate.bias.grad.abs().sum() > 0 for gate in converted.gates)


def test_trainer_trains_on_and_the_callback_steers(build_family, text, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from remoe.hf.sparsity import SparsityCallback

    converted, _ = swap_gates(build_family("olmoe"), text)
    rows = [{"input_ids": row, "labels": row} for row in text.calibration.tokens_BS]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True,
    )  # fmt: skip
    callback = SparsityCallback(init=1e-2)
    trainer = transformers.Trainer(converted, arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    coefs = [line["sparsity_coef"] for line in trainer.state.log_history if "sparsity_coef" in line]
    sparsities = [line["sparsity"] for line in trainer.state.log_history if "sparsity" in line]
    assert sparsities[0] == pytest.approx(1 - 2 / 8, abs=0.08)
    assert len(set(coefs)) > 1
    assert converted.config.sparsity_coef == pytest.approx(coefs[-1])
    trainer.save_model(str(tmp_path / "on"))
    assert (tmp_path / "on" / "modeling_relu_moe.py").is_file()
    with torch.no_grad():
        logits_BSV = converted(text.calibration.tokens_BS[:2]).logits
    predictions = trainer.predict([{"input_ids": row, "labels": row} for row in text.calibration.tokens_BS[:2]])
    torch.testing.assert_close(torch.from_numpy(predictions.predictions), logits_BSV)


def test_a_tensor_without_a_place_is_an_error(build_family):
    source = build_family("olmoe")
    source.register_parameter("left_over", torch.nn.Parameter(torch.zeros(2)))
    gates = [ReLUGate(gate.weight, torch.zeros(8), torch.ones(8)) for gate in topk_gates(source)]
    with pytest.raises(CheckpointError, match=r"unread .'left_over'."):
        with_relu_gates(source, gates)


def test_other_families_are_refused_by_name(build_family, text):
    with pytest.raises(ConfigError, match="the source is a 'llama', must be one of mixtral, olmoe"):
        swap_gates(build_family("llama", intermediate_size=48), text)
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        load_source("/nowhere")


def test_damaged_weights_are_one_error(build_family, tmp_path):
    build_family("olmoe").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        load_source(tmp_path)
