"""`remoe bench` as it is called."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Remoe, remoe

__all__ = ["remoe"]


def test_bench_layer_prints_a_table_and_writes_json(remoe: Remoe):
    done = remoe("bench", "layer", "--shapes", "tiny", "--peers", "dense", "--json", "out/layer.json")
    assert done.code == 0
    lines = [line.split()[:3] for line in done.out.splitlines()]
    assert ["tiny", "topk", "remoe"] in lines
    assert ["tiny", "topk", "dense"] in lines
    assert json.loads(Path("out/layer.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "remoe182m_E9"), "did you mean 'remoe182m_E"),
        (("--shapes", "tiny", "--peers", "dence"), "did you mean 'dense'?"),
        (("--shapes", "tiny", "--dtype", "bf61"), "must be one of bf16, fp16, fp32"),
        (("--shapes", "tiny", "--device", "cuda:99"), "cuda:99"),
    ],
)
def test_a_wrong_word_is_one_line_and_exit_code_2(remoe: Remoe, arguments: tuple[str, ...], message: str):
    done = remoe("bench", "layer", *arguments)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
