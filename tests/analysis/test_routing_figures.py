"""Figures of how tokens were routed, on numbers small enough to check by hand."""

import dataclasses

import numpy as np
import pytest
from conftest import make_runs

from remoe.analysis.collect import TextCounts
from remoe.analysis.figure import run_keys
from remoe.analysis.figures import domain_activity, domain_share, expert_tokens, load_map, text_sample, token_frequency

COUNTS = TextCounts(
    layers=(0, 2),
    top_k=1,
    domains=("code", "prose", "empty"),
    tokens_D=np.array([10, 30, 0]),
    load_LDE=np.array([[[10, 0], [15, 15], [0, 0]], [[5, 0], [30, 30], [0, 0]]]),
    tokens_by_active_LA=np.array([[0, 40, 0], [10, 0, 30]]),
    token_ids_U=np.array([3, 5, 8]),
    occurrences_U=np.array([30, 8, 2]),
    active_U=np.array([30, 16, 8]),
    token_layers=(1,),
    token_load_NEU=np.array([[[30, 2, 1], [3, 8, 2]]]),
)


@pytest.fixture
def small(runs):
    return [dataclasses.replace(runs[0], counts=COUNTS, token_texts=("the", "rare", "once"))]


def test_load_is_the_share_of_all_tokens(small):
    (load,) = load_map.numbers(small)
    assert load.load_LE.tolist() == [[25 / 40, 15 / 40], [35 / 40, 30 / 40]]
    assert load.uniform == 0.5
    assert load.idle == 0


@pytest.mark.parametrize(("load", "place"), [(1.0, 1.0), (1 / 8, 0.5), (1 / 64, 0.0), (1 / 65, None), (0.0, None)])
def test_the_load_scale_is_log2_from_1_to_a_64th(load, place):
    assert load_map.brightness(load) == (place if place is None else pytest.approx(place))


@pytest.mark.parametrize(("uniform", "log2"), [([1 / 8], -6), ([1 / 4], -6), ([1 / 8, 1 / 64], -9), ([0.1], -7)])
def test_the_scale_reaches_an_eighth_of_an_even_load(uniform, log2):
    assert load_map.scale_end(uniform) == log2


def test_shares_are_within_a_domain_and_domains_without_text_are_left_out(small):
    first, last = domain_share.numbers(small)
    assert (first.layer, last.layer) == (0, 2)
    assert first.domains == ("code", "prose")
    assert first.share_DE.tolist() == [[1.0, 0.0], [0.5, 0.5]]
    assert last.share_DE.tolist() == [[0.5, 0.0], [1.0, 1.0]]


@pytest.mark.filterwarnings("error")
def test_shares_of_experts_that_are_never_active_are_drawn(small):
    pytest.importorskip("matplotlib")
    counts = dataclasses.replace(COUNTS, load_LDE=np.zeros_like(COUNTS.load_LDE))
    assert len(domain_share.draw(domain_share.numbers([dataclasses.replace(small[0], counts=counts)]))) == 2


@pytest.mark.parametrize(("layers", "chosen"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (12, [0, 6, 11])])
def test_first_middle_and_last_layer_are_chosen_once_each(layers, chosen):
    assert domain_share.chosen_layers(layers) == chosen


def test_active_experts_are_counted_by_layer_and_domain(small):
    (activity,) = domain_activity.numbers(small)
    assert activity.active_LD.tolist() == [[1.0, 1.0], [0.5, 2.0]]
    assert activity.all_L.tolist() == [1.0, 65 / 40]
    assert activity.no_expert_L.tolist() == [0.0, 0.25]


def test_vocabulary_entries_are_sorted_by_mean_experts_and_rare_ones_left_out(small):
    (activity,) = token_frequency.numbers(small)
    assert activity.texts == ("the", "rare")
    assert activity.active_U.tolist() == [0.5, 1.0]
    assert activity.frequency_U.tolist() == [30 / 40, 8 / 40]
    assert activity.rank_correlation == pytest.approx(-1.0)


def test_rank_correlation_shares_ranks_among_equals():
    left, right = np.array([1.0, 2.0, 2.0, 4.0]), np.array([10, 20, 30, 40])
    assert token_frequency.rank_correlation(left, right) == pytest.approx(0.948683, abs=1e-6)
    assert token_frequency.rank_correlation(np.ones(4), right) == 0.0


def test_a_tokens_share_is_the_part_of_its_occurrences_that_an_expert_takes(small):
    shares = expert_tokens.numbers(small)
    assert [(s.layer, s.expert, s.text, s.share) for s in shares] == [(2, 0, "the", 1.0), (2, 1, "the", 0.1)]


def test_a_passage_shows_each_tokens_mean_over_layers(runs):
    coloured = text_sample.numbers(runs)[0]
    assert coloured.mean_T.tolist() == coloured.passage.active_TL.mean(1).tolist()
    assert coloured.place_T.max() == 1.0
    assert f"{coloured.mean_T[0]:.2f} experts; by layer" in text_sample.draw(coloured)


FIGURES = (load_map, domain_share, domain_activity, token_frequency, expert_tokens, text_sample)


@pytest.mark.parametrize("module", FIGURES)
def test_routed_runs_stand_side_by_side_and_dense_ones_are_absent(runs, module):
    captions = " ".join(chart.caption for chart in module.figure(runs).charts)
    assert "relu" in captions
    assert "topk" in captions
    assert "dense" not in captions


@pytest.mark.parametrize("module", FIGURES)
def test_a_dense_run_alone_has_no_routing_figure(runs, module):
    assert module.figure(runs[2:]) is None


def test_many_seeds_show_the_texts_of_the_first_of_each_setup():
    many = [dataclasses.replace(run, name=f"{run.name}-{seed}") for run in make_runs() for seed in range(2)]
    captions = {chart.caption for chart in text_sample.figure(many).charts}
    assert {caption.split(",")[0] for caption in captions} == {"relu-0", "topk-0"}
    assert len(load_map.figure(many).charts) == 4


def test_seeds_of_one_setup_share_a_colour_and_differ_in_dashes():
    many = [dataclasses.replace(run, name=f"{run.name}-{seed}") for run in make_runs() for seed in range(2)]
    keys = [(key.label, key.colour, key.shape) for key in run_keys(many)]
    assert keys[:3] == [("relu-0", "c0", "line"), ("relu-1", "c0", "dash"), ("topk-0", "c1", "line")]
