"""Every router by its name in every command; a new one is tested here without a change."""

import json

import pytest

from remoe.cli import main
from remoe.moe.routers import ROUTERS

pytestmark = pytest.mark.xdist_group("every-router")  # one comparison for all
every_router = pytest.mark.parametrize("name", sorted(ROUTERS))


@pytest.fixture(scope="module")
def comparison(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    few = ("--set", "train.steps=2", "--set", "train.validation_batches=1", "--no-report", "--root", str(root))
    with pytest.raises(SystemExit) as leaving:
        main(["compare", "demo-relu", "--routers", ",".join(sorted(ROUTERS)), "--name", "all", *tiny, *few])
    assert not leaving.value.code
    return root / "all"


@pytest.fixture
def run(comparison, name):
    return comparison / f"{name}-seed0"


@every_router
def test_compare_trains_it_and_measures_the_experts_it_uses_and_its_balance(comparison, run, name):
    outcome = json.loads((comparison / "comparison.json").read_text())["runs"][f"all/{name}-seed0"]
    assert outcome["steps"] == 2
    assert 0 < outcome["valid_active_experts"] <= 4
    assert outcome["load_balancing"] > 0
    assert outcome["load_balancing_coef"] in (0.0, pytest.approx(0.01))


@every_router
def test_eval_generate_export_and_analyze_take_its_run(remoe, run, name, tmp_path):
    for arguments in (
        ("eval", run),
        ("generate", run, "--prompt", "Line", "--max-new-tokens", 4),
        ("export", run, "--to", tmp_path / "export"),
        ("generate", tmp_path / "export", "--prompt", "Line", "--max-new-tokens", 4, "--temperature", 0),
        ("analyze", run, "--to", tmp_path / "report.html"),
    ):
        outcome = remoe(*arguments)
        assert outcome.code == 0, outcome.err
    assert (tmp_path / "report.html").stat().st_size > 50_000
