"""Which tiles a layer gets."""

import json

import pytest
import torch

from remoe.kernels.expert_mlp import tuning
from remoe.kernels.expert_mlp.chunks import chunks_of, kept_rows
from remoe.kernels.expert_mlp.tiles import GROUPED_MM, QUACK, QuackTiles, Sizes, Tiles, choose, words_of

MEASURED = Sizes(hidden_size=1024, expert_size=4096, num_experts=128, rows_per_expert=128.0)


def test_tiles_are_written_as_they_are_read():
    assert str(Tiles.parsed("128x256x64 w8 s3 g16")) == "128x256x64 w8 s3 g16"
    for words in ("quack 128x192 c2 pingpong", "quack 128x256 c1"):
        assert str(QuackTiles.parsed(words)) == words


def test_a_shape_between_measured_ones_gets_the_nearest_row():
    near = MEASURED._replace(hidden_size=1000, rows_per_expert=120.0)
    assert words_of(near, torch.bfloat16) == words_of(MEASURED, torch.bfloat16)
    assert GROUPED_MM in words_of(MEASURED, torch.bfloat16).values()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_only_bf16_uses_the_grouped_product_of_torch(dtype):
    assert GROUPED_MM not in words_of(MEASURED, dtype).values()


def by_quack(words):
    return {part for part, word in words.items() if word.startswith(QUACK)}


def test_quacks_products_are_never_used_or_where_the_table_says_or_always():
    assert by_quack(words_of(MEASURED, torch.bfloat16)) == set()
    by_table = words_of(MEASURED, torch.bfloat16, "where faster")
    assert by_quack(by_table) == {"swiglu", "grad_act", "grad_down", "grad_up"}
    assert by_table["down"] == words_of(MEASURED, torch.bfloat16)["down"]
    everywhere = by_quack(words_of(MEASURED, torch.float16, "always"))
    assert everywhere == {"swiglu", "down", "grad_act", "grad_down", "grad_up", "grad_x"}
    few = MEASURED._replace(rows_per_expert=4.0)
    assert by_quack(words_of(few, torch.bfloat16, "where faster")) == set()
    assert by_quack(words_of(MEASURED, torch.float32, "always")) == set(), "it has no products of fp32"


def test_interleaved_pre_activations_are_those_of_quack():
    assert not choose(MEASURED, torch.bfloat16).interleaves
    assert choose(MEASURED, torch.bfloat16, "where faster").interleaves


@pytest.mark.parametrize(
    ("num_rows", "row_cap", "widths", "sizes"),
    [
        (0, 0, (8, 32), []),
        (0, 5, (8, 32), []),
        (7, 0, (8, 32), [7]),
        (7, 7, (8, 32), [7]),
        (8, 7, (8, 32), [6, 2]),
        (32, 12, (8, 32), [9, 23]),  # 12 * 232 // 104 = 26 rows at most
        (40, 12, (8, 32), [9, 16, 15]),
        (40, 12, (128, 8), [9, 11, 11, 9]),  # 12 * 184 // 152 = 14
    ],
)
def test_chunks_are_what_is_kept_and_as_few_others_as_may_take_memory(num_rows, row_cap, widths, sizes):
    chunks = chunks_of(num_rows, row_cap, *widths)
    assert [chunk.size for chunk in chunks] == sizes
    assert [chunk.first for chunk in chunks] == [sum(sizes[:index]) for index in range(len(sizes))]
    assert kept_rows(num_rows, row_cap) == (sizes[0] if sizes else 0)


def test_tables_keep_what_was_found_with_and_without_quack_apart(tmp_path):
    table = tmp_path / "table.json"
    sizes = {"num_tokens": 1024, "hidden_size": 64, "expert_size": 128, "num_experts": 8, "top_k": 1}
    row = {"shape": "new", "device": "NVIDIA H200", "sizes": sizes}
    ours, quack = words_of(MEASURED, torch.bfloat16), {"down": "quack 128x192 c1 pingpong"}

    def saved(best, tried):
        tuning.save([row | {"best": best, "tried": {"down": dict.fromkeys(tried, 1.0)}}], table)
        (kept,) = json.loads(table.read_text())["rows"]
        return kept["choices"], kept.get("quack")

    assert saved(ours, [ours["down"]]) == (ours, None)
    assert saved(ours | quack, [ours["down"], quack["down"]]) == (ours, quack)
    others = ours | {"grad_x": "128x128x64 w8 s3 g8"}
    assert saved(others, [ours["down"]]) == (others, quack), "made without it: what was found with it stays"
    assert saved(others, [quack["down"]]) == (others, {}), "it was tried and is not the fastest"


def test_a_forced_choice_holds_inside_only():
    before = choose(MEASURED, torch.bfloat16)
    with tuning.forced("grad_x", GROUPED_MM):
        assert choose(MEASURED, torch.bfloat16).grad_x is None
    assert choose(MEASURED, torch.bfloat16) == before
