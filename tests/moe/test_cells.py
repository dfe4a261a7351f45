"""The cells against torch's own, their sizes, and sharing one among routers."""

import pytest
import torch
from torch import nn

from remoe import ConfigError, build_router
from remoe.moe.cells import GRUCell, IdentityCell, LeakySumCell, LSTMCell, RNNCell, share_cell
from remoe.moe.initial import reset
from remoe.moe.recurrence import RecurrentOptions, build_cell

F64 = torch.float64


def drawn(cell):
    reset(cell, 0.02)
    return cell.double()


@pytest.mark.parametrize(
    ("cell_class", "torch_class"), [(GRUCell, nn.GRUCell), (RNNCell, nn.RNNCell), (LSTMCell, nn.LSTMCell)]
)
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_cells_equal_torch_s_in_value_and_gradient(cell_class, torch_class, num_tokens):
    torch.manual_seed(0)
    ours = drawn(cell_class(5, 3))
    theirs = torch_class(5, 3).double()
    theirs.load_state_dict(ours.state_dict())
    input_TP = torch.randn(num_tokens, 5, dtype=F64, requires_grad=True)
    state_TP = torch.randn(num_tokens, ours.state_size, dtype=F64, requires_grad=True)
    expected = theirs(input_TP, state_TP.chunk(2, dim=-1) if cell_class is LSTMCell else state_TP)
    expected = torch.cat(expected, dim=-1) if cell_class is LSTMCell else expected
    actual = ours(input_TP, state_TP)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)
    wanted = torch.autograd.grad(expected.square().sum(), [input_TP, state_TP, *theirs.parameters()])
    found = torch.autograd.grad(actual.square().sum(), [input_TP, state_TP, *ours.parameters()])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("learned", ["no", "scalar", "vector"])
def test_the_leaky_sum_starts_at_its_leak_and_learns_it_where_asked(learned):
    cell = drawn(LeakySumCell(2, 2, 0.25, learned))
    out = cell(torch.tensor([[1.0, 2.0]], dtype=F64), torch.tensor([[4.0, -8.0]], dtype=F64))
    assert out.tolist() == [[2.0, 0.0]]
    assert [p.numel() for p in cell.parameters()] == {"no": [], "scalar": [1], "vector": [2]}[learned]


def test_the_identity_cell_reads_no_state():
    input_TP = torch.randn(3, 4)
    assert IdentityCell(4, 4)(input_TP, torch.full((3, 4), torch.nan)) is input_TP


@pytest.mark.parametrize(
    ("options", "hidden_size", "count"),
    [
        ({"cell": "gru"}, 352, 99_072),
        ({"cell": "gru", "projector": "shared"}, 352, 185_088),
        ({"cell": "rnn"}, 352, 33_024),
        ({"cell": "lstm"}, 352, 132_096),
        ({"cell": "leaky"}, 352, 0),
        ({"cell": "gru", "cell_bias": False}, 1280, 98_304),
    ],
)
def test_published_cell_sizes(options, hidden_size, count):
    cell = build_cell(RecurrentOptions(**options), hidden_size)
    assert sum(parameter.numel() for parameter in cell.parameters()) == count


def test_weights_start_as_torch_s_and_biases_as_asked():
    torch.manual_seed(0)
    cells = {bias: drawn(GRUCell(64, 64, bias)) for bias in ("library", "zero", "none")}
    for cell in cells.values():
        assert 0.99 / 8 < cell.weight_hh.abs().max() <= 1 / 8
    assert cells["library"].bias_hh.abs().max() > 0.1
    assert not cells["zero"].bias_hh.any()
    assert cells["none"].bias_hh is None


def test_routers_share_the_first_one_s_cell_and_register_none():
    routers = [build_router("rmoe", 8, 4, 2, state_size=4) for _ in range(3)]
    first = routers[0].cell
    shared = share_cell([build_router("relu", 8, 4, 2), *routers])
    assert shared is first
    assert all(router.cell is first for router in routers)
    assert [sorted(dict(router.named_parameters())) for router in routers] == [["head", "projector"]] * 3
    assert share_cell([shared, build_router("topk", 8, 4, 2)]) is None
    assert share_cell(routers) is first


def test_different_cells_are_not_shared():
    routers = [build_router("rmoe", 8, 4, 2, state_size=size) for size in (4, 5)]
    with pytest.raises(ConfigError, match="equal cell and sizes"):
        share_cell(routers)
