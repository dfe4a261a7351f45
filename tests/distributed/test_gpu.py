"""The numbers of test_same_numbers.py between GPUs, through NCCL."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.conftest import WORKER, torchrun
from tests.distributed.test_same_numbers import check

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("num_gpus", "num_layouts", "num_pipelines"), [(2, 11, 1), (4, 14, 5)])
def test_loss_and_every_gradient_of_several_gpus_are_those_of_one(
    tmp_path: Path, num_gpus: int, num_layouts: int, num_pipelines: int
):
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs")
    output = tmp_path / "results.json"
    visible = ",".join(map(str, range(num_gpus)))
    environment = {"DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": visible}
    cases = ("all_steps", "pipelined_steps", "coefficients")
    finished = torchrun(num_gpus, str(WORKER), str(output), *cases, timeout=300, **environment)
    assert finished.returncode == 0, finished.stderr[-4000:]
    results = json.loads(output.read_text())
    check(results["all_steps"], num_cases=3 * num_layouts * 2)
    check(results["pipelined_steps"], num_cases=3 * num_pipelines * 2)
    assert len({found["found"] for found in results["coefficients"]}) == 1
