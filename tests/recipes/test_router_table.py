"""benchmarks/router_table.py rebuilds the documents' numbers from the raw logs that are kept under results/."""

import importlib.util
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def load_script():
    spec = importlib.util.spec_from_file_location("router_table", ROOT / "benchmarks" / "router_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


router_table = load_script()


def cells(text, router):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return next(dict(zip(rows[0], row, strict=True)) for row in rows if row[0] == router)


@pytest.fixture(scope="module")
def pile6():
    return router_table.arms_in(ROOT / "results" / "pile6", step=400)


def test_paired_differences_and_intervals_are_those_of_the_pile6_page(pile6):
    arms, left_out = pile6
    text = router_table.table(arms, ["relu", "dense"])
    assert left_out == []
    assert cells(text, "topk")["minus relu (95 %)"] == "+0.1369 (+0.0119 to +0.2619)"
    assert cells(text, "dense")["minus relu (95 %)"] == "+0.1037 (-0.1695 to +0.3770)"
    assert cells(text, "relu")["minus relu (95 %)"] == ""
    assert cells(text, "relu")["seeds"] == "3"
    assert text.splitlines()[2].startswith("| relu ")  # the lowest loss first


def test_worst_layer_is_the_mean_of_late_steps_and_none_for_a_dense_model(pile6):
    arms, _ = pile6
    assert 0.5 < max(run.starved for run in arms["relu"].values()) < 1
    assert {run.starved for run in arms["topk"].values()} == {0.0}
    assert {run.starved for run in arms["dense"].values()} == {None}


def test_topk_and_dense_of_equal_width_cost_alike_up_to_one_step(pile6):
    arms, _ = pile6
    assert arms["topk"][0].flops == pytest.approx(arms["dense"][0].flops, rel=0.01)


def test_run_without_a_validation_at_the_step_is_named_and_left_out():
    arms, left_out = router_table.arms_in(ROOT / "results" / "pile6")
    assert "topk-seed0 has no validation at step 600, left out" in left_out
    assert 0 not in arms["topk"]


def test_bytes_are_counted_in_bits_and_prefixes_are_dropped(tmp_path):
    for router in ("topk", "relu"):
        shutil.copytree(ROOT / "results" / "routers-cpu" / f"{router}-seed0", tmp_path / f"our-{router}-seed0")
    arms, _ = router_table.arms_in(tmp_path, prefix="our-")
    text = router_table.table(arms, ["topk", "relu"])
    assert cells(text, "topk")["loss"] == "3.6051"  # 2.4989 nats
    assert cells(text, "relu")["minus topk (95 %)"] == "-0.1292"  # one pair: no interval
    assert cells(text, "relu")["experts"] == "0.92"
