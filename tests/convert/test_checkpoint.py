"""Converting folders: our own runs and exports, Mixtral and Llama, OLMoE, and what is refused."""

import json

import pytest
import torch

from remoe.config import from_dict
from remoe.convert.checkpoint import ConvertConfig, convert
from remoe.convert.own import Upcycling
from remoe.convert.text import TextSizes
from remoe.errors import ConfigError, DataError
from remoe.export import write_export
from remoe.training import Run, TrainConfig, load, train
from remoe.training.saved import tokenizer_of

SIZES = TextSizes(calibration_sequences=12, sequences=8)
SHORT = ConvertConfig(sizes=SIZES)
TOKENS = torch.arange(3, 59).view(2, 28)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = ("".join(chr(97 + (i * j) % 26) for j in range(60)) for i in range(80))
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    def build(**model) -> Run:
        small = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 16}
        values = {
            "model": small | {"num_experts": 4, "top_k": 2, "init_std": 0.1} | model,
            "data": {"train": str(text), "sequence_length": 16, "cache": str(text.parent / "cache"),
                     "validation_fraction": 0.5},
            "train": {"steps": 3, "batch_size": 4, "validation_batches": 2, "device": "cpu"},
        }  # fmt: skip
        return train(from_dict(TrainConfig, values), root=tmp_path_factory.mktemp("runs"))

    return build


@pytest.fixture(scope="module")
def topk_run(trained):
    return trained(router={"name": "topk", "renormalize": True})


def test_a_top_k_run_becomes_an_export_with_relu_routing(topk_run, tmp_path):
    result = convert(topk_run.path, tmp_path, SHORT)
    model = load(tmp_path)
    assert model.config.router == {"name": "relu", "bias": True, "normalize": True}
    assert json.loads((tmp_path / "conversion.json").read_text())["agreement"]["tokens"] == 8 * 16
    assert result.agreement.loss_after == pytest.approx(result.agreement.loss_before, abs=0.1)
    assert tokenizer_of(tmp_path).name == "bytes"
    assert json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"] == 16


def test_training_goes_on_from_a_converted_model(topk_run, text, tmp_path):
    convert(topk_run.path, tmp_path / "relu", SHORT)
    values = {
        "data": {"train": str(text), "sequence_length": 16, "cache": str(text.parent / "cache")},
        "sparsity": {"init": 1e-2},
        "train": {"init_from": str(tmp_path / "relu"), "steps": 2, "batch_size": 4, "device": "cpu",
                  "validation_batches": 2},
    }  # fmt: skip
    rows = train(from_dict(TrainConfig, values), root=tmp_path / "runs").metrics()
    assert rows[0]["sparsity_coef"] == pytest.approx(1e-2)
    assert rows[1]["sparsity_coef"] != rows[0]["sparsity_coef"]
    assert 0.3 < rows[0]["sparsity"] < 0.7  # k = 2 of 4


def test_a_dense_run_is_upcycled_without_text(trained, tmp_path):
    source = trained(moe_layers="none")
    result = convert(source.path, tmp_path, ConvertConfig(upcycling=Upcycling(num_experts=2, granularity=2)))
    assert result.agreement is None
    torch.testing.assert_close(load(tmp_path)(TOKENS).logits, load(source.path)(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_text_tells_how_exact_upcycling_is(trained, text, tmp_path):
    config = ConvertConfig(data=str(text), sizes=SIZES, upcycling=Upcycling(num_experts=4))
    agreement = convert(trained(moe_layers="none").path, tmp_path, config).agreement
    assert agreement.largest_logit_difference < 1e-4
    assert agreement.same_top_1 == 1.0


@pytest.mark.parametrize(
    ("router", "config", "error", "message"),
    [
        ("relu", {}, ConfigError, "the source's router is relu, must be topk"),
        ("relu", {"router": "topk"}, ConfigError, "the model has router relu: it uses as many experts"),
        ("topk", {"router": "hash"}, ConfigError, "--router is 'hash', must be one of relu, topk"),
        ("topk", {"sizes": TextSizes(calibration_sequences=9999)}, DataError, "must have more than the 9999"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_and_leaves_nothing(trained, tmp_path, router, config, error, message):
    with pytest.raises(error, match=message):
        convert(trained(router=router).path, tmp_path, ConvertConfig(**{"sizes": SIZES} | config))
    assert not any(tmp_path.iterdir())


def test_an_export_needs_a_text(topk_run, tmp_path):
    write_export(load(topk_run.path), tokenizer_of(topk_run.path), tmp_path / "export")
    with pytest.raises(ConfigError, match="knows no text; give one to fit gates on with --data"):
        convert(tmp_path / "export", tmp_path / "relu", SHORT)


@pytest.mark.heavy
def test_a_top_k_run_is_a_mixtral_and_comes_back(topk_run, text, tmp_path):
    assert convert(topk_run.path, tmp_path / "mixtral", ConvertConfig(router="topk")).target == "mixtral"
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "mixtral")("some text")["input_ids"]
    assert ids == tokenizer_of(topk_run.path).encode("some text").tolist()
    mixtral = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral")
    torch.testing.assert_close(mixtral(TOKENS).logits, load(topk_run.path)(TOKENS).logits, rtol=1e-4, atol=1e-4)
    config = ConvertConfig(data=str(text), sequence_length=16, sizes=SIZES)
    result = convert(tmp_path / "mixtral", tmp_path / "relu", config)
    assert (result.source, result.target) == ("mixtral", "native")
    own = convert(topk_run.path, tmp_path / "own", ConvertConfig(data=str(text), sizes=SIZES))
    assert result.overlap == pytest.approx(own.overlap, abs=0.02)


@pytest.mark.heavy
def test_olmoe_stays_a_model_of_transformers_with_its_own_type(build_family, text, tmp_path):
    build_family("olmoe", vocab_size=257).save_pretrained(tmp_path / "olmoe")
    config = ConvertConfig(data=str(text), tokenizer="bytes", sequence_length=16, sizes=SIZES)
    result = convert(tmp_path / "olmoe", tmp_path / "relu", config)
    assert (result.source, result.target) == ("olmoe", "relu_olmoe")
    assert {"conversion.json", "modeling_relu_moe.py"} <= {file.name for file in (tmp_path / "relu").iterdir()}
    with pytest.raises(ConfigError, match="must be a native model to become Top-K again"):
        convert(tmp_path / "olmoe", tmp_path / "back", ConvertConfig(router="topk"))
