"""The setup of RMoE's worked vectors (rmoe.md §9): d=3, p=2, E=4, k=2, three layers, one token."""

import torch
from torch import nn

from remoe import RouterContext, build_router
from remoe.moe.cells import share_cell
from tests.moe.routers.rmoe_vectors import mat, vec, x

F64 = torch.float64


def packed(codes, make, *shape):
    return torch.cat([make(code, *shape) for code in codes])


INPUTS = [x(layer) for layer in (1, 2, 3)]

CELL_VALUES = {
    "gru": ((20, 21, 22), (23, 24, 25), (26, 27, 28), (29, 30, 31)),
    "rnn": ((22,), (25,), (28,), (31,)),
    "lstm": ((60, 61, 62, 63), (64, 65, 66, 67), (68, 69, 70, 71), (72, 73, 74, 75)),
    "leaky": None,
    "identity": None,
}


def fill(module, **values):
    for name, value in values.items():
        old = getattr(module, name)
        assert old.shape == value.shape, f"{name}: {old.shape} and {value.shape}"
        setattr(module, name, nn.Parameter(value.to(old.dtype)))


def fill_cell(cell, name):
    if CELL_VALUES[name] is None:
        return
    w, u, b, c = CELL_VALUES[name]
    fill(cell, weight_hh=packed(u, mat, 2, 2), bias_ih=packed(b, vec, 2), bias_hh=packed(c, vec, 2))
    is_shared = cell.input_size == 3
    fill(cell, weight_ih=packed((80, 81, 82), mat, 2, 3) if is_shared else packed(w, mat, 2, 2))


def worked_routers(name="rmoe", dtype=F64, **options):
    """Three routers with the vectors' values that share one cell; recurrent ReLU's head is Mat(40+i), without bias."""
    options = {"bias": name == "rmoe", "state_size": 2} | options
    routers = [build_router(name, 3, 4, 2, **options).to(dtype) for _ in range(3)]
    cell = share_cell(routers)
    fill_cell(cell, options.get("cell", "gru"))
    for layer, router in enumerate(routers, start=1):
        if router.projector is not None:
            fill(router, projector=mat(layer, 2, 3))
        if router.projector is not None and router.projector_bias is not None:
            fill(router, projector_bias=vec(10 + layer, 2))
        if router.head_bias is not None:
            fill(router, head_bias=vec(44 + layer, 4))
        if router.head_proj is None:
            fill(router, head=mat(40 + layer, 4, 2) * (5 if name == "rmoe" else 1))
    return routers


def run(routers, inputs=None, state_TP=None, **context):
    """Route layer after layer, the state handed on: the three Routings."""
    routings = []
    for router, hidden_TH in zip(routers, INPUTS if inputs is None else inputs, strict=True):
        routings.append(router(hidden_TH.to(router.head.dtype), RouterContext(state_TP=state_TP, **context)))
        state_TP = routings[-1].state_TP
    return routings


def assert_near(actual, expected, dtype=F64):
    expected = torch.as_tensor(expected, dtype=dtype).reshape(actual.shape)
    tolerance = 1e-9 if dtype == F64 else 1e-5
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
