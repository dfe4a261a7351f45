"""The figure of the density dial: only where a curve was measured, with every point in its table."""

import pytest

from remoe.analysis.examine import examine
from remoe.analysis.figures import density
from remoe.analysis.record import load_records, save_records
from remoe.eval.density import DensityConfig, measure_density, save_curve
from remoe.training.run import DENSITY

pytestmark = pytest.mark.xdist_group("report")  # the runs are trained once


def test_runs_without_a_curve_have_no_figure(runs):
    assert density.figure([run for run in runs if run.router != "relu"]) is None
    assert [run.run for run in density.numbers(runs)] == ["relu"]


def test_the_table_holds_every_point(runs):
    figure = density.figure(runs)
    assert len(figure.table.rows) == 7
    assert figure.table.rows[0] == ("relu", "per_layer", 0.5, 0.5, 2.1, "0.125 0.125 0.125 0.125")


def test_a_measured_curve_comes_with_the_run_and_survives_as_json(trained_runs, tmp_path):
    path = trained_runs[0]
    assert examine(path, {}).density is None
    settings = DensityConfig(targets=(0.5,), calibration_sequences=2, sequences=2, device="cpu")
    curve = measure_density(path, config=settings)
    save_curve(curve, path / DENSITY)
    try:
        record = examine(path, {})
    finally:
        (path / DENSITY).unlink()
    assert record.density == curve
    save_records([record], tmp_path / "analysis.json")
    assert load_records(tmp_path / "analysis.json")[0].density == curve
