"""Facts about scoring a checkpoint on held-out text."""

import dataclasses
import math

import numpy as np
import pytest

from remoe.config import from_dict
from remoe.data import load_tokenizer
from remoe.errors import ConfigError
from remoe.eval import evaluate_checkpoint
from remoe.eval.held_out import summarise
from remoe.eval.text_size import TextSize, text_size
from remoe.model.weights import save_model
from remoe.training import Run, TrainConfig, load, train


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join("the cat sat on the mat " * 8 + str(i) for i in range(40)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, text) -> Run:
    model = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 16}
    values = {
        "model": model | {"num_experts": 4, "init_std": 0.1},
        "data": {"train": str(text), "sequence_length": 16, "cache": str(text.parent / "cache")},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 4, "batch_size": 4, "validation_batches": 2, "device": "cpu"},
    }
    return train(from_dict(TrainConfig, values), root=tmp_path_factory.mktemp("runs"))


def test_a_runs_score_is_its_last_validation_loss(run):
    result = evaluate_checkpoint(run.path, device="cpu")
    assert result.total.loss == pytest.approx(run.valid_loss, rel=1e-6)
    assert result.total.perplexity == pytest.approx(math.exp(run.valid_loss), rel=1e-5)
    assert result.active_experts is not None
    assert result.to_dict()["total"]["tokens"] == result.total.tokens


def test_batch_size_does_not_change_the_score_and_more_text_can_be_asked_for(run):
    eight, two = (evaluate_checkpoint(run.path, num_sequences=8, batch_size=size, device="cpu") for size in (8, 2))
    assert two.total.loss == pytest.approx(eight.total.loss, rel=1e-6)
    assert two.total.tokens == eight.total.tokens == 8 * 16
    more = evaluate_checkpoint(run.path, num_sequences=12, batch_size=4, device="cpu")
    assert more.total.tokens == 12 * 16


def test_bytes_as_tokens_have_as_many_bits_per_byte_as_per_text_token(run):
    result = evaluate_checkpoint(run.path, device="cpu").total
    assert result.bits_per_byte == pytest.approx(result.bits_per_character)
    assert result.bits_per_byte >= result.loss / math.log(2)


def test_other_text_can_be_given(run, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("zyx " * 400, encoding="utf-8")
    data = dataclasses.replace(run.config.data, train="gone.txt", validation=str(other))
    assert evaluate_checkpoint(run.path, data, device="cpu").total.loss > run.valid_loss


def test_an_export_needs_text(run, tmp_path):
    save_model(load(run.path), tmp_path / "export")
    with pytest.raises(ConfigError, match="give the data to evaluate on"):
        evaluate_checkpoint(tmp_path / "export")
    result = evaluate_checkpoint(tmp_path / "export", run.config.data, num_sequences=8, device="cpu")
    assert result.total.loss == pytest.approx(run.valid_loss, rel=1e-6)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(run, tmp_path, text):
    save_model(load(run.path), tmp_path / "export")
    wide = tmp_path / "wide.txt"
    wide.write_text("".join(chr(code) for code in range(0x4E00, 0x4E00 + 3000)), encoding="utf-8")
    data = dataclasses.replace(run.config.data, train=str(wide), tokenizer="characters")
    with pytest.raises(
        ConfigError, match=r"model\.vocab_size is 257, .* ids of tokenizer characters; name the tokenizer that"
    ):
        evaluate_checkpoint(tmp_path / "export", data)


def test_scores_of_domains_add_up_to_the_whole():
    result = {"per_domain": {"a": 1.0, "b": 2.0}, "labels": {"a": 30, "b": 10}, "active_experts": None}
    scores = summarise(result, {"a": TextSize(60, 60), "b": TextSize(40, 20)})
    assert scores.total.loss == pytest.approx(1.25)
    assert scores.total.bits_per_byte == pytest.approx(50 / math.log(2) / 100)
    assert scores.total.bits_per_character == pytest.approx(50 / math.log(2) / 80)
    assert scores.per_domain["b"].bits_per_character == pytest.approx(1 / math.log(2))


def test_characters_of_several_bytes_count_once_as_characters():
    tokenizer = load_tokenizer("bytes")
    ids = np.append(tokenizer.encode("aé€"), tokenizer.eod).astype(np.int64)
    assert text_size(ids, tokenizer) == TextSize(6, 3)
    assert text_size(ids[2:], tokenizer) == TextSize(4, 1)  # the second byte of é, and €
