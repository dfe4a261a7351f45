"""Charts of results."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from remoe.bench.chart import check_chart_path, draw, layer_bars
from remoe.errors import ConfigError

pytest.importorskip("matplotlib")


def row(kind: str, candidate: str, route: str, milliseconds: float | None, floor_ms: float = 1.0) -> dict:
    sizes = [16384, 768, 3072, 8, 1]
    found = {"shape": "remoe182m_E8", "kind": kind, "candidate": candidate, "route": route, "sizes": sizes}
    return found | {"forward_backward_ms": milliseconds, "floor_ms": floor_ms}


ROWS = [
    {"shape": "all", "candidate": "sonicmoe", "kind": "peer", "note": "sonicmoe is not installed"},
    row("ours", "remoe", "var", 1.6),
    row("ours", "remoe", "topk", 1.5),
    row("peer", "grouped_mm", "var", 3.0),
    row("peer", "sonicmoe", "var", 2.0),
    row("peer", "liger", "var", None),
    row("ceiling", "dense", "topk", 1.4),
]
RESULTS = {
    "benchmark": "layer",
    "limits": {"matmul_tflops": 786.0, "copy_gb_per_second": 3020.0},
    "gpus": ["a GPU"],
    "dtype": "bfloat16",
    "rows": ROWS,
}


def test_bars_are_ours_and_the_best_peer_as_shares_of_the_limit():
    bars = [(bar.series, bar.share, bar.label) for bar in layer_bars(ROWS)]
    assert bars == [
        ("remoe, variable counts", 1 / 1.6, "1.60 ms"),
        ("best peer, variable counts", 0.5, "2.00 ms  sonicmoe"),
        ("remoe, fixed k", 1 / 1.5, "1.50 ms"),
        ("dense MLP, same FLOPs", 1 / 1.4, "1.40 ms"),
    ]


def test_a_dense_mlp_faster_than_the_layers_limit_is_not_drawn():
    assert layer_bars([row("ceiling", "dense", "topk", 2.7, floor_ms=3.9)]) == []


def test_an_svg_follows_the_readers_dark_theme_and_is_the_same_each_time(tmp_path: Path):
    for name in ("a.svg", "b.svg"):
        draw(RESULTS, tmp_path / name)
    svg = (tmp_path / "a.svg").read_text()
    assert svg == (tmp_path / "b.svg").read_text()
    ElementTree.fromstring(svg)
    assert "prefers-color-scheme:dark" in svg
    assert "fill: var(--ours)" in svg
    assert "2.00 ms  sonicmoe" in svg


def test_a_png_can_be_written(tmp_path: Path):
    draw(RESULTS, tmp_path / "new" / "chart.png")
    assert (tmp_path / "new" / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_another_type_of_file_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match=r"must end in \.svg or \.png"):
        check_chart_path(Path("chart.jpg"))
