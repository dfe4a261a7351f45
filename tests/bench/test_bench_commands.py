"""`remoe bench` as it is called."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Remoe

TINY = tuple(
    word
    for setting in (
        "model.vocab_size=97",
        "model.hidden_size=32",
        "model.num_layers=1",
        "model.num_heads=2",
        "model.num_kv_heads=1",
        "model.intermediate_size=24",
        "data.sequence_length=64",
    )
    for word in ("--set", setting)
)


def test_bench_layer_prints_a_table_and_writes_json(remoe: Remoe):
    done = remoe("bench", "layer", "--shapes", "tiny", "--peers", "dense", "--json", "out/layer.json")
    assert done.code == 0
    lines = [line.split()[:3] for line in done.out.splitlines()]
    assert ["tiny", "topk", "remoe"] in lines
    assert ["tiny", "topk", "dense"] in lines
    assert json.loads(Path("out/layer.json").read_text())["rows"]


def test_bench_model_prints_both_phases_and_what_relu_costs(remoe: Remoe):
    sizes = ("--micro-batch", 8, "--accumulation", 1, "--steps", 1, "--no-compile", "--device", "cpu")
    done = remoe("bench", "model", "demo-relu", *TINY, *sizes, "--json", "model.json", "--chart", "model.svg")
    assert done.code == 0, done.err
    lines = [line.split()[:3] for line in done.out.splitlines()]
    assert [line for line in lines if line[:1] == ["demo-relu"]] == [
        ["demo-relu", "start", "relu"],
        ["demo-relu", "steady", "relu"],
        ["demo-relu", "steady", "topk"],
    ]
    assert "demo-relu: ReLU at" in done.out
    assert Path("model.svg").read_text().startswith("<?xml")


def test_bench_decode_prints_prefill_and_decoding(remoe: Remoe):
    sizes = ("--batches", "1,2", "--prompt", "2x64", "--context", 8, "--new-tokens", 8, "--repeats", 1)
    done = remoe("bench", "decode", "demo-relu", *TINY, *sizes, "--device", "cpu", "--chart", "decode.svg")
    assert done.code == 0, done.err
    lines = [line.split()[1:4] for line in done.out.splitlines() if line.startswith("demo-relu")]
    assert lines[::2] == [["prefill", "relu", "2"], ["decode", "relu", "1"], ["decode", "relu", "2"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("layer", "--shapes", "remoe182m_E9"), "did you mean 'remoe182m_E"),
        (("layer", "--shapes", "tiny", "--peers", "dence"), "did you mean 'dense'?"),
        (("layer", "--shapes", "tiny", "--dtype", "bf61"), "must be one of bf16, fp16, fp32"),
        (("layer", "--shapes", "tiny", "--device", "cuda:99"), "cuda:99"),
        (("layer", "--shapes", "tiny", "--chart", "chart.pdf"), "must end in .svg or .png"),
        (("model", "demo-rleu"), "did you mean 'demo-relu'?"),
        (("model", "demo-relu", "--peers", "transformer"), "did you mean 'transformers'?"),
        (("decode", "demo-relu", "--prompt", "16"), "must be SEQUENCESxTOKENS"),
        (("decode", "demo-relu", "--batches", "one"), "must be whole numbers"),
    ],
)
def test_a_wrong_word_is_one_line_and_exit_code_2(remoe: Remoe, arguments: tuple[str, ...], message: str):
    done = remoe("bench", *arguments)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
