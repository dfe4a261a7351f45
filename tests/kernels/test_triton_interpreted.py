"""The Triton kernels on a CPU, in Triton's interpreter, beside the plain path in float64."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton (remoe[triton])")
pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def found():
    program = Path(__file__).with_name("interpreted.py")
    run = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_every_output_and_gradient_is_that_of_the_plain_path(found):
    limits = {"float32": 1e-5, "float16": 4e-3}  # a few roundings of 2^-24 and 2^-11 over sums of up to 48
    wrong = {
        case: error
        for case, error in found["errors"].items()
        if not error < next(limit for name, limit in limits.items() if name in case)
    }
    assert len(found["errors"]) == 216
    assert not wrong


def test_a_chunks_rows_are_gone_before_the_next_ones_are_made(found):
    assert len(found["past rows"]) > 4, "chunks of both passes"
    assert not any(found["past rows"])


def test_the_gradient_of_pre_activations_made_again_takes_their_place_and_of_kept_ones_never(found):
    assert found["in place"] == {"kept": [False], "others": [True]}


def test_sums_of_rows_that_lie_anywhere_are_those_of_the_plain_path(found):
    assert len(found["combined"]) == 15
    assert max(found["combined"].values()) < 1e-5


def test_the_lists_are_those_of_the_reference(found):
    assert len(found["lists"]) == 18
    assert all(found["lists"].values())


def test_interleaved_pre_activations_have_the_gradients_of_those_in_halves(found):
    assert len(found["interleaved"]) == 8
    assert all(found["interleaved"].values())


def test_routers_logits_and_gradients_are_those_of_the_plain_path(found):
    assert len(found["routers"]) == 10
    for case, (logits, grad_hidden, grad_weight) in found["routers"].items():
        assert max(logits, grad_weight) < 1e-6, case
        assert grad_hidden < (1e-6 if "float32" in case else 2**-10), case  # half: rounded to its 11 bits
