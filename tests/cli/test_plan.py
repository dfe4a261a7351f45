"""`remoe plan --gpus`."""

import json

import pytest


def test_layouts_come_with_their_costs_and_the_source_of_every_constant(remoe):
    outcome = remoe("plan", "remoe-469m-relu", "--gpus", "4", "--json")
    assert outcome.code == 0
    values = json.loads(outcome.out)
    assert values["parameters"]["total"] == 2_583_938_048
    assert {one["parallel"]["expert"] for one in values["layouts"]} == {1, 2, 4}
    assert {one["parallel"]["pipeline"] for one in values["layouts"]} == {1, 2, 4}
    best = values["layouts"][0]
    assert best["fits"]
    assert best["tokens_per_second"] == pytest.approx(512 * 1024 / best["step_seconds"]["total"])
    sources = [one["source"] for one in values["machine"]["constants"].values()]
    assert all(source.startswith(("results/gpu/", "assumed: ")) for source in sources)


def test_the_table_says_what_is_assumed(remoe):
    outcome = remoe("plan", "remoe-182m-relu", "--gpus", "2")
    assert outcome.code == 0
    *_, measured, assumed = outcome.out.splitlines()
    assert "layouts fit; the fastest" in outcome.out
    assert "bubble: what of the step the stages of a pipeline wait" in outcome.out
    assert measured.startswith("measured: ")
    assert "expert_products" in measured
    assert assumed.startswith("assumed: ")
    assert "network_link" in assumed


def test_gpus_that_cannot_share_the_batch_are_refused_with_the_way_out(remoe):
    outcome = remoe("plan", "remoe-182m-relu", "--gpus", "13")
    assert outcome.code == 2
    assert "--gpus is 13, but train.batch_size = 512" in outcome.err
    assert "nor its 12 layers by stages" in outcome.err
