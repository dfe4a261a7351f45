"""The page of density curves of models that are no runs."""

import pytest

from remoe.analysis.report import write_report
from remoe.errors import CheckpointError
from remoe.eval.density import DensityCurve, DensityPoint, save_curve


def save(folder, loss):
    at = {"target": 1.0, "loss": loss + 0.01, "active_experts": 1.0}
    points = (
        DensityPoint(kind="per_layer", thresholds=(0.25, 0.125), **at),
        DensityPoint(kind="trained", target=None, thresholds=(0.0, 0.0), loss=loss, active_experts=2.0),
    )
    curve = DensityCurve(num_experts=8, top_k=2, calibration_tokens=1234, tokens=5678, points=points)
    save_curve(curve, folder / "density.json")
    (folder / "config.json").write_text("{}")
    return folder


def test_curves_of_several_models_are_in_one_page(tmp_path):
    folders = [save(tmp_path / "<b>first", 3.125), save(tmp_path / "second", 2.875)]
    path = write_report(folders, folders[0])
    assert path == folders[0] / "report.html"
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert "&lt;b&gt;first" in text
    assert "<b>first" not in text
    for shown in ("3.125", "2.875", "0.25 0.125", "1,234 tokens", "density.json in a model&#x27;s folder"):
        assert shown in text
    assert "Data and settings" not in text


def test_a_model_without_a_curve_has_no_page(tmp_path):
    folder = save(tmp_path / "model", 3.0)
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="is not a run"):
        write_report([folder, tmp_path / "other"], folder)
    assert not (folder / "report.html").exists()
