"""Hash routing: the worked ids (TV12), its tables, and what it needs."""

import pytest
import torch

from remoe import ConfigError, RouterContext, build_router
from remoe.moe.routers.hash import balanced_table

IDS = torch.tensor([0, 7, 8, 198, 50256, 262])


def experts_of(router, ids=IDS, layer_index=0):
    context = RouterContext(token_ids_T=ids, layer_index=layer_index)
    routing = router(torch.zeros(len(ids), 4), context)
    assert torch.equal(routing.weights_TE, routing.routing_map_TE.float())
    assert routing.logits_TE is None
    return routing.routing_map_TE.int().argmax(1)


def skewed_counts(size=1000):
    """Zipf-like: the first id is a thousand times as frequent as the last."""
    return (1e6 / torch.arange(1, size + 1, dtype=torch.float64)).round()


def test_the_worked_ids_go_to_their_remainder():
    assert experts_of(build_router("hash", 4, 8, 1)).tolist() == [0, 7, 0, 6, 0, 6]


def test_several_experts_a_token_are_neighbours_with_gate_one():
    routing = build_router("hash", 4, 8, 3)(torch.zeros(2, 4), RouterContext(token_ids_T=torch.tensor([1, 7])))
    assert routing.weights_TE.tolist() == [[0, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 1]]


def test_masked_tokens_have_no_expert():
    mask = torch.tensor([True, False, True, True, False, True])
    routing = build_router("hash", 4, 8, 1)(torch.zeros(6, 4), RouterContext(token_ids_T=IDS, token_mask_T=mask))
    assert torch.equal(routing.routing_map_TE.any(1), mask)


def test_a_random_table_is_even_over_ids_and_the_same_each_time():
    ids = torch.arange(50_000)
    first = experts_of(build_router("hash", 4, 8, 1, table="random"), ids)
    assert torch.equal(first, experts_of(build_router("hash", 4, 8, 1, table="random"), ids))
    shares = first.bincount(minlength=8) / 50_000
    assert ((shares - 1 / 8).abs() < 0.005).all()
    other = experts_of(build_router("hash", 4, 8, 1, table="random", seed=1), ids)
    assert 0.1 < (first == other).double().mean() < 0.15  # 1 in 8 by chance


def test_layers_have_tables_of_their_own_only_where_asked_for():
    ids = torch.arange(10_000)
    shared = build_router("hash", 4, 8, 1, table="random")
    assert torch.equal(experts_of(shared, ids, 0), experts_of(shared, ids, 1))
    own = build_router("hash", 4, 8, 1, table="random", per_layer=True)
    assert 0.1 < (experts_of(own, ids, 0) == experts_of(own, ids, 1)).double().mean() < 0.15


def test_a_balanced_table_gives_each_expert_the_same_share_of_the_text():
    counts = skewed_counts()
    table = balanced_table(counts, 8)
    share = torch.zeros(8, dtype=torch.float64).index_add(0, table, counts) / counts.sum()
    assert ((share - 1 / 8).abs() < 0.02).sum() >= 7  # the first id alone is 13 % of the text
    by_remainder = torch.zeros(8, dtype=torch.float64).index_add(0, torch.arange(1000) % 8, counts) / counts.sum()
    assert share.max() < by_remainder.max() - 0.08


def test_a_balanced_table_follows_the_greedy_rule():
    # 5 -> 0; 4 -> 1; 3 -> 2; then 3 goes to the least loaded (2: 3+1), 1 to expert 1 (4+1), 0 to expert 0 (5+1)
    assert balanced_table(torch.tensor([1, 5, 3, 4, 3, 0]), 3).tolist() == [1, 0, 2, 1, 2, 0]


def test_ids_that_never_occur_are_spread_over_the_experts():
    assert balanced_table(torch.zeros(80), 8).bincount(minlength=8).tolist() == [10] * 8


def test_a_balanced_router_uses_its_prepared_table_and_saves_it():
    router = build_router("hash", 4, 8, 1, table="balanced", vocab_size=1000)
    ids = torch.arange(1000)
    assert torch.equal(experts_of(router, ids), ids % 8)
    router.prepare(skewed_counts(), layer_index=0)
    assert torch.equal(experts_of(router, ids), balanced_table(skewed_counts(), 8))
    again = build_router("hash", 4, 8, 1, table="balanced", vocab_size=1000)
    again.load_state_dict(router.state_dict())
    assert torch.equal(experts_of(again, ids), experts_of(router, ids))


def test_balanced_tables_of_layers_differ_and_are_all_balanced():
    counts = skewed_counts().clamp(max=50_000)
    tables = []
    for layer in range(2):
        router = build_router("hash", 4, 8, 1, table="balanced", vocab_size=1000, per_layer=True)
        router.prepare(counts, layer)
        share = torch.zeros(8, dtype=torch.float64).index_add(0, router.table, counts) / counts.sum()
        assert ((share - 1 / 8).abs() < 0.01).all()
        tables.append(router.table)
    assert (tables[0] == tables[1]).double().mean() < 0.5


@pytest.mark.parametrize(
    ("options", "context", "message"),
    [
        ({}, None, "token_ids_T"),
        ({}, RouterContext(), "token_ids_T"),
        ({"table": "random", "per_layer": True}, RouterContext(token_ids_T=IDS), "layer_index"),
        ({"table": "balanced"}, RouterContext(token_ids_T=IDS), "vocab_size"),
    ],
)
def test_what_is_missing_is_named(options, context, message):
    with pytest.raises(ConfigError, match=message):
        build_router("hash", 4, 8, 1, **options)(torch.zeros(6, 4), context)


@pytest.mark.parametrize(("options", "message"), [({"table": "modulo"}, "mod"), ({"per_layer": True}, "per_layer")])
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build_router("hash", 4, 8, 1, **options)


def test_counts_of_another_vocabulary_are_refused():
    router = build_router("hash", 4, 8, 1, table="balanced", vocab_size=10)
    with pytest.raises(ConfigError, match="table of 10 ids, got counts of 12"):
        router.prepare(torch.ones(12), 0)
