"""Fine-tuning on two processes has the numbers of one: padding is nobody's token, whatever the layout."""

import dataclasses
import json
from pathlib import Path

import pytest

from remoe.training import train
from remoe.training.run import Run
from tests.distributed.test_training import assert_close, remoe_train, write_config
from tests.training.conftest import MODEL, config, text  # noqa: F401

pytestmark = pytest.mark.xdist_group("distributed")


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "router"), [({"data_shard": 2}, "topk"), ({"pipeline": 2}, "relu")], ids=str)
def test_two_processes_fine_tune_as_one_does(config, tmp_path: Path, layout, router):  # noqa: F811
    """But for auxiliary terms: they are means over the tokens of one forward pass, which data ranks share."""
    questions = tmp_path / "questions.jsonl"
    rows = [{"instruction": f"Say {n}.", "output": " ".join([str(n)] * (1 + n % 4))} for n in range(24)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = {"model": {**MODEL, "router": router}, "losses": {"load_balancing_coef": 0.0}}
    base = train(config(name="base", train={"steps": 2}, **model), root=tmp_path)
    small = config(name="one", optimizer={"schedule": "constant"}, parallel=layout, **model)
    data = dataclasses.replace(
        small.data, train=str(questions), format="instructions", template="plain", sequence_length=32
    )
    loop = dataclasses.replace(small.train, init_from=base.path, steps=3, micro_batch_size=1, freeze_router="head")
    tuned = dataclasses.replace(small, data=data, train=loop)
    alone = train(dataclasses.replace(tuned, parallel=type(tuned.parallel)()), root=tmp_path)
    finished = remoe_train(2, write_config(tmp_path, dataclasses.replace(tuned, name="two")), tmp_path)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert_close(Run.open(tmp_path / "two").metrics(), alone.metrics())
