"""Converted models where models of ours are expected: the density curve, saved thresholds, losses on text."""

import dataclasses
import json
import random
import string
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.heavy
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from remoe.convert.checkpoint import ConvertConfig, convert  # noqa: E402
from remoe.convert.either import load_either, save_at  # noqa: E402
from remoe.convert.model_type import is_converted  # noqa: E402
from remoe.convert.modeling_relu_moe import FAMILIES  # noqa: E402
from remoe.convert.text import TextSizes  # noqa: E402
from remoe.errors import CheckpointError, ConfigError  # noqa: E402
from remoe.eval import evaluate_checkpoint  # noqa: E402
from remoe.eval.density import ONE_NUMBER, DensityConfig, measure_density  # noqa: E402
from remoe.eval.held_out import open_model_and_text, text_beside  # noqa: E402
from remoe.moe import dial  # noqa: E402

TOKENS = torch.arange(3, 59).view(2, 28)
SETTINGS = DensityConfig(targets=(1.0, 3.0), calibration_sequences=8, sequences=12, batch_size=4, device="cpu")


@pytest.fixture
def build_folder(build_family, tmp_path):
    """A folder that `convert` wrote, and the text beside it."""

    def build(model_type="olmoe"):
        text = tmp_path / "text.txt"
        letters = random.Random(1)  # a text that repeated itself would tie the logits of many tokens
        lines = ("".join(letters.choices(string.ascii_lowercase, k=60)) for _ in range(80))
        text.write_text("\n\n".join(lines), encoding="utf-8")
        build_family(model_type, vocab_size=257, max_position_embeddings=64).save_pretrained(tmp_path / "source")
        sizes = TextSizes(calibration_sequences=24, sequences=8)
        config = ConvertConfig(data=str(text), tokenizer="bytes", sequence_length=16, sizes=sizes)
        convert(tmp_path / "source", tmp_path / "relu", config)
        return tmp_path / "relu"

    return build


@pytest.fixture
def folder(build_folder):
    return build_folder()


def text_of(folder, **changes):
    data = text_beside(folder, str(folder.parent / "text.txt"), 16)
    return dataclasses.replace(data, cache=folder.parent / "cache", **changes)


@pytest.mark.parametrize("model_type", [family for family in FAMILIES if family != "mixtral"])  # that becomes ours
def test_a_curve_of_any_family_meets_its_targets_where_thresholds_were_chosen(build_folder, model_type):
    folder = build_folder(model_type)
    curve = measure_density(folder, text_of(folder), SETTINGS, load=load_either)
    assert (curve.num_experts, curve.top_k) == (8, 2)
    assert (curve.calibration_tokens, curve.tokens) == (8 * 16, 12 * 16)
    opened = open_model_and_text(folder, text_of(folder), "cpu", load_either)
    calibration = list(opened.sequences(8, 8))
    for target in SETTINGS.targets:
        thresholds = curve.at(target).thresholds
        dial.set_thresholds(opened.model, thresholds)
        with dial.recorded(opened.model) as outputs:
            found = opened.evaluate(calibration)["active_experts"]
        at_threshold = sum(  # its logit and equals: rounding, other in other batches, opens or closes them
            int(((output.logits_TE - thresholds[call % len(thresholds)]).abs() < 1e-5 * output.logits_TE.std()).sum())
            for call, output in enumerate(outputs)
        )
        assert 0 < at_threshold <= 2 * 8  # a token in each of 8 sequences, in both layers
        assert found == pytest.approx(target, abs=(at_threshold + 1e-6) / (len(thresholds) * 8 * 16))


def test_losses_and_counts_are_those_of_transformers(folder):
    curve = measure_density(folder, text_of(folder), SETTINGS, load=load_either)
    opened = open_model_and_text(folder, text_of(folder), "cpu", load_either)
    rest = list(opened.sequences(20, 4))[2:]  # the batches that were measured: in others ties are rounded otherwise
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model) is not type(opened.model.inner)
    for point in curve.points:
        model.set_thresholds(list(point.thresholds))
        losses, active, tokens = [], 0, 0
        for batch in rest:
            with torch.no_grad():
                out = model(batch.tokens_BS)
            losses.append(torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), batch.labels_BS.flatten()))
            active, tokens = active + int(out.tokens_per_expert.sum()), tokens + 3 * int(out.num_tokens)
        assert point.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
        assert point.active_experts == pytest.approx(active / tokens)


def test_padding_counts_neither_in_thresholds_nor_in_losses(folder):
    model = load_either(folder)
    mask_BS = torch.ones_like(TOKENS, dtype=torch.bool)
    mask_BS[1, 20:] = False
    labels_BS = TOKENS.roll(-1, 1).masked_fill(~mask_BS, -100)
    with torch.no_grad():
        padded = model(TOKENS, mask_BS, labels_BS=labels_BS, reduction="none")
        alone = model(TOKENS[1:, :20], labels_BS=labels_BS[1:, :20], reduction="none")
    torch.testing.assert_close(padded.losses[1, :20], alone.losses[0], rtol=1e-4, atol=1e-4)
    assert padded.losses[1, 20:].tolist() == [0] * 8
    for routing, other in zip(padded.routings, alone.routings, strict=True):
        assert torch.equal(routing.routing_map_TE[28:48], other.routing_map_TE)
        assert not routing.routing_map_TE[48:].any()
    with dial.choosing_thresholds(model, [1.5, 2.5, 1.0], mask_BS.flatten()), torch.no_grad():
        routings = model(TOKENS, mask_BS).routings
    assert [int(routing.routing_map_TE.sum()) for routing in routings] == [72, 120, 48]


@pytest.mark.parametrize("kind", ["per_layer", ONE_NUMBER])
def test_saved_thresholds_are_in_force_in_transformers_and_in_ours(folder, tmp_path, kind):
    curve = measure_density(folder, text_of(folder), SETTINGS, load=load_either)
    point, to = curve.at(1.0, kind), tmp_path / "sparser"
    save_at(point, folder, to)
    assert tuple(json.loads((to / "config.json").read_text())["thresholds"]) == point.thresholds
    again = measure_density(to, text_of(to), SETTINGS, load=load_either)
    assert (again.trained.thresholds, again.trained.loss) == (point.thresholds, point.loss)
    own = evaluate_checkpoint(to, text_of(to), num_sequences=20, batch_size=4, device="cpu", load=load_either)
    whole = open_model_and_text(folder, text_of(folder), "cpu", load_either)
    dial.set_thresholds(whole.model, point.thresholds)
    assert own.active_experts == whole.evaluate(whole.sequences(20, 4))["active_experts"]
    torch.save((TOKENS, load_either(to)(TOKENS).logits), tmp_path / "expected.pt")
    script = """
import sys, torch
sys.modules["remoe"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
tokens, expected = torch.load(sys.argv[2])
torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=2e-5)
by_hand = tokens[:, :5]
for _ in range(3):
    by_hand = torch.cat((by_hand, model(by_hand).logits[:, -1:].argmax(-1)), 1)
assert torch.equal(model.generate(tokens[:, :5], max_new_tokens=3, do_sample=False), by_hand)
assert AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)("ab").input_ids == [97, 98]
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(to), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_saving_changes_nothing_but_the_dial(folder, tmp_path):
    curve = measure_density(folder, text_of(folder), SETTINGS, load=load_either)
    save_at(curve.at(1.0), folder, tmp_path / "sparser")
    before, after = load_either(folder).state_dict(), load_either(tmp_path / "sparser").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    values = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "sparser")]
    assert {key for key in values[0] if values[0][key] != values[1][key]} == {"thresholds"}
    with pytest.raises(ConfigError, match="must be new or empty"):
        save_at(curve.at(1.0), folder, tmp_path / "sparser")


def test_one_number_can_stand_for_the_saved_thresholds(folder):
    asked = {"num_sequences": 8, "batch_size": 4, "device": "cpu", "load": load_either}
    trained, closed = (evaluate_checkpoint(folder, text_of(folder), threshold=at, **asked) for at in (0.0, 99.0))
    assert trained == evaluate_checkpoint(folder, text_of(folder), **asked)
    assert 1.5 < trained.active_experts < 2.5
    assert closed.active_experts == 0
    with pytest.raises(ConfigError, match="thresholds is nan, must be finite"):
        evaluate_checkpoint(folder, text_of(folder), threshold=float("nan"), **asked)


def test_code_in_the_folder_never_runs(folder, tmp_path):
    (folder / "modeling_relu_moe.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert load_either(folder)(TOKENS).logits.shape == (2, 28, 257)
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_read_is_one_error(folder, tmp_path):
    assert is_converted(folder)
    assert not is_converted(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"thresholds": [0.1, 0.2]}, "thresholds has 2 numbers, must be one, or one for each of 3"),
        ({"thresholds": "x"}, "thresholds is 'x', must be finite numbers"),
        ({"thresholds": [0.1, None, 0.2]}, "must be finite numbers"),
        ({"model_type": "relu_llama"}, "is 'relu_llama', must be one of relu_mixtral, relu_olmoe"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=message):
            load_either(folder)


def test_a_folder_without_its_tokenizer_says_what_is_missing(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "remoe_tokenizer.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer; put the model's tokenizer\.json into it"):
        text_of(folder)


def test_attention_inside_documents_is_refused(folder):
    with pytest.raises(ConfigError, match=r"data\.document_mask is true, must be false for a model of transformers"):
        measure_density(folder, text_of(folder, document_mask=True), SETTINGS, load=load_either)
