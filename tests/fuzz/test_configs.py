"""The campaign of tools/fuzz_configs.py, small, and what it found in large ones."""

import pytest
import yaml
from tools import fuzz_configs

from remoe.recipes.catalog import merge


def test_every_generated_config_trains_a_step_or_ends_in_one_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = fuzz_configs.campaign(count=60, seed=7, folder=tmp_path)
    assert found["faults"] == {}
    assert sum(found["outcomes"].values()) == found["configs"] >= 60
    assert found["outcomes"][fuzz_configs.STEPPED] > 10
    assert found["outcomes"][fuzz_configs.REFUSED] > 10


LARGE = {"num_layers": 10**30, "hidden_size": 2**40, "num_experts": 2**31, "vocab_size": 2**62}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"model": {key: size}}, f"{key} is {size}, must be between 1 and") for key, size in LARGE.items()),
        ({"data": {"train": ""}}, "data.train: . is a folder"),
        ({"data": {"train": "."}}, "data.train: . is a folder"),
        ({"data": {"cache": "x" * 300}}, "File name too long"),
        ({"name": "x" * 300}, "File name too long"),
        ({"sparsity": {"multiplier": float("nan")}}, "sparsity.multiplier is nan, must be above 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_campaign_found_is_refused_with_one_message(tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    fuzz_configs.write_text(tmp_path / "text.jsonl")
    code, said, _ = fuzz_configs.run_config(yaml.safe_dump(merge(fuzz_configs.BASE, changes)), tmp_path)
    assert code == 2
    assert message in said
