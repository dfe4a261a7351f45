"""Two processes under each kind of Megatron's parallelism, with its own schedules and wrappers: worker.py."""

import json
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="needs the extra megatron")

from tests.distributed.adapters.megatron.worker import CASES, COEFFICIENT, MICRO_BATCHES
from tests.distributed.conftest import torchrun

pytestmark = [pytest.mark.heavy, pytest.mark.slow, pytest.mark.xdist_group("distributed")]
ALL = [*CASES, "context"]
TOLERANCE = 1e-6  # of a gradient's largest value: both sides compute rotary angles in fp32


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("megatron") / "results.json"
    worker = "tests.distributed.adapters.megatron.worker"
    finished = torchrun(2, "-m", worker, str(output), timeout=240)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("case", ALL)
def test_all_gradients_are_those_of_our_model_in_one_process(results: dict[str, Any], case: str):
    wrong = {name: value for name, value in results[case][0]["differences"].items() if not value < TOLERANCE}
    assert not wrong


@pytest.mark.parametrize("case", ALL)
def test_all_ranks_take_the_same_step_of_the_coefficient(results: dict[str, Any], case: str):
    first, second = (rank["coef"] for rank in results[case])
    assert first == second
    assert first in (pytest.approx(COEFFICIENT * 1.2), pytest.approx(COEFFICIENT / 1.2))


@pytest.mark.parametrize("case", CASES)
def test_every_token_of_every_rank_is_counted_once(results: dict[str, Any], case: str):
    for rank in results[case]:
        assert rank["counts"] == results[case][0]["expected"]
    tokens = {rows[-1] for rows in results[case][0]["counts"]}
    assert len(tokens) == 1
    assert tokens.pop() % (MICRO_BATCHES * 16) == 0


def test_ranks_that_share_a_sequence_add_their_counts_up(results: dict[str, Any]):
    first, second = (rank["counts"] for rank in results["context"])
    assert first == second
    assert first[0][-1] == 16
    assert first[1:] == [[0] * 5] * 2
