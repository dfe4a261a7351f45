"""docs/performance.md is made from results/."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("performance_tables", ROOT / "benchmarks" / "performance_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(shape: str, kind: str, candidate: str, route: str, milliseconds: float, **more) -> dict:
    sizes = {"sizes": [16384, 1024, 4096, 8, 1], "floor_ms": 1.0, "target_ms": 1.75}
    timed = {"forward_ms": milliseconds / 3, "forward_backward_ms": milliseconds, "tflops": 400.0}
    return {"shape": shape, "kind": kind, "candidate": candidate, "route": route, **sizes, **timed, **more}


def test_the_page_agrees_with_the_results(tables):
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert tables.rebuilt(page, ROOT) == page


def test_check_exits_with_1_where_the_page_is_old(tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = tmp_path / "performance.md"
    page.write_text("<!-- layer results/none.json -->\n1.23\n<!-- end -->\n")
    monkeypatch.setattr(tables, "PAGE", page)
    monkeypatch.setattr(tables, "CHART", tmp_path / "chart.svg")
    monkeypatch.setattr(sys, "argv", ["performance_tables.py", "--check"])
    with pytest.raises(SystemExit, match=r"differs from results/; run: python benchmarks/performance_tables\.py"):
        tables.main()
    monkeypatch.setattr(sys, "argv", ["performance_tables.py"])
    tables.main()
    assert page.read_text() == "<!-- layer results/none.json -->\nNot measured yet: no none.json.\n<!-- end -->\n"
    assert (tmp_path / "chart.svg").read_text().startswith("<?xml")


def test_a_later_file_has_the_last_word_on_its_shapes(tables, tmp_path: Path):
    for name, rows in (
        ("one.json", [row("a", "ours", "remoe", "var", 1.8), row("b", "ours", "remoe", "var", 1.9)]),
        ("two.json", [row("b", "ours", "remoe", "var", 1.5)]),
    ):
        (tmp_path / name).write_text(json.dumps({"rows": rows}))
    text = tables.rebuilt("<!-- layer one.json+two.json -->\n<!-- end -->", tmp_path)
    assert text.count("**1.80**") == text.count("**1.50**") == 1
    assert "1.90" not in text


def test_a_layer_row_has_the_best_of_each_kind_and_whether_the_target_is_reached(tables):
    rows = [
        row("a", "ours", "remoe", "var", 1.8),
        row("a", "ours", "remoe_capacity", "var", 1.7),
        row("a", "peer", "sonicmoe", "var", 2.4),
        row("a", "peer", "grouped_mm", "var", 3.4),
        row("b", "ours", "remoe", "var", 1.9),
    ]
    text = tables.layer({"rows": rows})
    assert "| a (16384, 1024, 4096, 8, 1) | 1.00 | – | **1.70** | – | 2.40 sonicmoe | – | ≤ 1.75 | yes |" in text
    assert text.endswith("| – | – | ≤ 1.75 | **no** |")


def test_figures_compare_rows_with_each_other(tables):
    rows = [
        row("remoe469m_E8", "ours", "remoe", "even_fixed", 2.0),
        row("remoe469m_E8", "ours", "remoe", "even_var", 2.05),
        row("remoe469m_E8", "ours", "remoe", "var", 2.0),
        row("remoe469m_E32", "ours", "remoe", "var", 2.4),
        row("remoe469m_E128", "ours", "remoe", "var", 4.4, floor_ms=4.0),
    ]
    text = tables.figures({"rows": rows})
    assert (
        "remoe469m_E8, remoe: variable over fixed k at equal counts per expert | 1.025 | 0.97 to 1.03 | yes |" in text
    )
    assert "| remoe469m_E32 over remoe469m_E8 | 1.200 | ≤ 1.15 | **no** |" in text
    assert "| remoe469m_E128 over its memory floor | 1.100 | ≤ 1.2 | yes |" in text


def test_figures_of_the_dense_start_are_time_and_peak_in_chunks(tables):
    rows = [
        row("stage1_182m_E8", "ours", "remoe_chunked", "var", 8.6, peak_bytes=110),
        row("remoe182m_E8", "ours", "remoe", "var", 1.7, peak_bytes=100),
    ]
    text = tables.figures({"rows": rows})
    assert "| stage1_182m_E8 in chunks, ms | 8.60 | ≤ 8.5 | **no** |" in text
    assert "| its peak over the steady state's | 1.100 | ≤ 1.15 | yes |" in text


def test_ratios_compare_relu_with_top_k_and_with_transformers(tables):
    rows = [
        {"model": "m", "kind": "ratio", "speed": 1.004, "stages_extra_time": 0.0012, "candidate": "relu over topk"},
        {"model": "m", "kind": "ours", "candidate": "relu", "phase": "steady", "tokens_per_second": 300.0},
        {"model": "m", "kind": "peer", "candidate": "transformers", "phase": "steady", "tokens_per_second": 200.0},
    ]
    text = tables.ratios({"rows": rows})
    assert "| m | ReLU's tokens/s over Top-K's, steady state | 1.004 | ≥ 1.00 |" in text
    assert "| m | extra time of Stages I and II in 60k steps, at most | 0.12% | ≤ 0.4 % |" in text
    assert "| m | ReLU's tokens/s over transformers's | 1.50 |  |" in text
