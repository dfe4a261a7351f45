"""Figures of what a run logged: losses, stages, sparsity per layer, flips."""

import dataclasses

import numpy as np
import pytest

from remoe.analysis.figures import flips, layer_sparsity, loss_curves, stages, summary
from remoe.analysis.metrics import Metrics, smooth, thinned


def test_stage_1_ends_where_the_term_becomes_visible_and_stage_2_on_the_first_step_on_target():
    steps = np.arange(1, 7)
    sparsity = np.array([0.5, 0.5, 0.52, 0.7, 0.9, 0.8])
    term = np.array([1e-6, 1e-4, 3e-3, 0.1, 0.1, 0.1])
    lm_loss = np.full(6, 2.0)
    assert stages.boundaries(steps, sparsity, term, lm_loss, 0.875) == (3, 5)


def test_stage_1_also_ends_where_sparsity_has_risen_by_more_than_a_twentieth():
    sparsity = np.array([0.5, 0.56, 0.6])
    assert stages.boundaries(np.arange(3), sparsity, np.zeros(3), np.ones(3), 0.875) == (1, None)


def test_no_stage_ends_in_a_run_that_stays_dense():
    assert stages.boundaries(np.arange(3), np.full(3, 0.5), np.zeros(3), np.ones(3), 0.875) == (None, None)


def test_settling_is_told_beside_the_papers(runs):
    found = stages.numbers(runs)
    assert [run.run for run in found] == ["relu"]
    assert 95 <= found[0].stage_2_end <= 101
    told = f"settled after {found[0].stage_2_end} steps from a coefficient of 1.2e-08 (the paper's took 110 from 1e-8)"
    assert told in stages.settled(found[0])


def test_the_stages_table_names_each_steps_stage(runs):
    table = stages.figure(runs).table
    named = [row[table.columns.index("stage")] for row in table.rows]
    assert named == sorted(named)
    assert set(named) == {"I", "II", "III"}


def test_dense_runs_have_losses_but_no_routing(runs):
    assert [curve.run for curve in loss_curves.numbers(runs)] == ["relu", "topk", "dense"]
    assert [run.run for run in layer_sparsity.numbers(runs)] == ["relu", "topk"]
    assert [run.run for run in flips.numbers(runs)] == ["relu", "topk"]


def test_differences_pair_the_steps_that_both_runs_logged(runs):
    curves = loss_curves.numbers(runs)
    (index, _, topk), (_, _, dense) = loss_curves.differences(curves)
    assert index == 1
    assert topk[-1] == pytest.approx(0.03, abs=0.05)
    assert dense[-1] == pytest.approx(0.1, abs=0.05)


def test_smoothing_is_the_mean_of_a_value_and_those_before_it():
    assert smooth(np.array([1.0, 3.0, 5.0, 7.0]), 2).tolist() == [1.0, 2.0, 4.0, 6.0]


def test_series_leave_out_steps_where_a_key_was_not_measured():
    metrics = Metrics(({"step": 1, "a": None}, {"step": 2, "a": 3.0, "b": 1}, {"step": 3, "a": float("nan")}))
    steps, values = metrics.series("step", "a")
    assert (steps.tolist(), values.tolist()) == ([2.0], [3.0])


def test_long_logs_keep_their_start_their_end_and_every_validation():
    rows = [{"step": step} | ({"valid_loss": 1.0} if step % 997 == 0 else {}) for step in range(1, 60_001)]
    kept = [row["step"] for row in thinned(rows).rows]
    assert kept[:2000] == list(range(1, 2001))
    assert kept[-1] == 60_000
    assert set(range(997, 60_001, 997)) <= set(kept)
    assert len(kept) < 4200


def test_sparsity_at_the_end_is_the_mean_of_the_last_tenth(runs):
    relu = layer_sparsity.numbers(runs)[0]
    assert relu.end_L.tolist() == relu.sparsity_NL[-31:].mean(0).tolist()
    assert np.diff(relu.end_L) == pytest.approx([0.02, 0.02, 0.02])


@pytest.mark.parametrize(("logged", "expected"), [({"valid_active_experts": 0.9}, 0.9), ({}, 1.25)])
def test_experts_a_token_used_come_from_the_logged_validation_where_there_is_no_checkpoint(runs, logged, expected):
    relu = next(run for run in runs if run.router == "relu")
    row = {**relu.metrics.rows[-1], "active_experts": 1.25, **logged}
    known_by_its_log = dataclasses.replace(relu, counts=None, metrics=Metrics((row,)))
    assert summary.numbers([known_by_its_log])[0].active_experts == expected
