"""Data parallel training with accelerate: one coefficient, from the counts of all processes."""

import json
import os
import subprocess
import sys

import pytest
import torch

from remoe import hf
from remoe.model import ReMoEForCausalLM

pytestmark = [pytest.mark.heavy, pytest.mark.slow]

WORKER = """
import json, sys, torch
from accelerate import Accelerator
from remoe import hf, model
from tests.model.conftest import SMALL
accelerator = Accelerator(cpu=True)
tokens_BS = torch.load(sys.argv[1])[accelerator.process_index : accelerator.process_index + 1]
own = hf.from_native(model.ReMoEForCausalLM(model.ReMoEConfig(**SMALL))).train()
with torch.no_grad():
    own.model.layers[0].mlp.router.weight.zero_()  # a layer without active experts must not hold the others up
wrapped, optimizer = accelerator.prepare(own, torch.optim.SGD(own.parameters(), lr=0.1))
tracker = hf.SparsityTracker(wrapped, init=0.05)
for _ in range(2):
    accelerator.backward(wrapped(tokens_BS, labels=tokens_BS).loss)
    optimizer.step()
    optimizer.zero_grad()
    tracker.step()
with open(f"{sys.argv[2]}/{accelerator.process_index}.json", "w") as file:
    json.dump([float(tracker.controller.coef), tracker.density_L.tolist(), float(own.lm_head.weight.sum())], file)
"""


def test_all_processes_have_the_coefficient_and_density_of_all_tokens(build, tokens_BS, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    torch.save(tokens_BS, tmp_path / "tokens.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    arguments = ["--standalone", "--nproc-per-node", "2", str(tmp_path / "worker.py"), str(tmp_path / "tokens.pt")]
    command = [sys.executable, "-m", "torch.distributed.run", *arguments, str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[:2] == trained_alone(build(), tokens_BS)


def trained_alone(model: ReMoEForCausalLM, tokens_BS: torch.Tensor) -> list[object]:
    """One process over the rows in turn, which weighs experts by the loads of one row as each process does."""
    own = hf.from_native(model).train()
    with torch.no_grad():
        own.model.layers[0].mlp.router.weight.zero_()
    tracker = hf.SparsityTracker(own, init=0.05)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    for _ in range(2):
        for row_1S in tokens_BS.split(1):
            (own(row_1S, labels=row_1S).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        tracker.step()
    assert tracker.density_L is not None
    return [float(tracker.controller.coef), tracker.density_L.tolist()]
