"""A run with TensorBoard, W&B offline and trackio, stopped and resumed, and what the libraries' own files then hold."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from remoe.training.metrics import read_metrics
from remoe.training.sinks import numbers
from tests.recipes.conftest import TINY

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900), pytest.mark.xdist_group("sinks")]  # trained once
NAME, STEPS, RESUMED = "tiny", 2, 4

Lines = dict[int, dict[str, float]]


@pytest.fixture(scope="module", name="root")
def _root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for library in ("tensorboard", "wandb", "trackio"):
        pytest.importorskip(library)
    root = tmp_path_factory.mktemp("sinks")
    text = root / "text.txt"
    text.write_text("\n\n".join(f"Line {i} of a text, {i * i} is its square." for i in range(200)), encoding="utf-8")
    settings = (*TINY, f"name={NAME}", f"data.train={text}", "train.sinks=[tensorboard, wandb, trackio]")
    for steps, *resume in ((STEPS,), (RESUMED, "--resume")):
        command = ["train", "demo-relu", "--no-report", *resume, "--set", *settings, f"train.steps={steps}"]
        run_python(root, "-m", "remoe", *command)
    return root


def run_python(root: Path, *arguments: str) -> str:
    """Run Python with every library's files below `root`; it must succeed, and no sink may complain."""
    own = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "TRACKIO_DIR": str(root / "trackio")}
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "failed and is left out" not in finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module", name="logged")
def _logged(root: Path) -> Lines:
    """What metrics.jsonl holds: the source of truth."""
    lines = {line["step"]: numbers(line) for line in read_metrics(root / "runs" / NAME / "metrics.jsonl")}
    assert list(lines) == list(range(1, RESUMED + 1))
    return lines


def test_tensorboard_has_every_number_of_both_parts(root: Path, logged: Lines):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / "runs" / NAME / "tensorboard"))
    events.Reload()
    found: Lines = {step: {} for step in logged}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found[event.step][name] = event.value
    assert found == {step: pytest.approx(line, rel=1e-6, nan_ok=True) for step, line in logged.items()}


def test_wandb_goes_on_in_the_same_run_and_has_every_number(root: Path, logged: Lines):
    files = sorted((root / "runs" / NAME / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert files[0].name == files[1].name  # the id: both parts are synced into one run
    found = {
        int(line.pop("_step")): {name: value for name, value in line.items() if not name.startswith("_")}
        for file in files
        for line in wandb_history(file)
    }
    assert found == {step: pytest.approx(line, nan_ok=True) for step, line in logged.items()}


def wandb_history(path: Path) -> Iterator[dict[str, float]]:
    """The logged lines of an offline file: a header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # no room for a header: the block ends with zeros
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or its last part
            parsed, record = wandb_internal_pb2.Record.FromString(record), b""
            if parsed.WhichOneof("record_type") == "history":
                yield {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in parsed.history.item
                }


def test_trackio_goes_on_in_the_same_run_and_has_every_number(root: Path, logged: Lines):
    code = (
        "import json\nfrom trackio.sqlite_storage import SQLiteStorage as storage\n"
        f"print(json.dumps([storage.get_runs('remoe'), storage.get_logs('remoe', '{NAME}')], default=str))"
    )
    runs, lines = json.loads(run_python(root, "-c", code).splitlines()[-1])
    assert len(runs) == 1
    found = {
        line["step"]: {name: value for name, value in line.items() if name not in ("step", "timestamp")}
        for line in lines
        if "lm_loss" in line  # others measure the machine
    }
    assert found == {step: pytest.approx(line, nan_ok=True) for step, line in logged.items()}
