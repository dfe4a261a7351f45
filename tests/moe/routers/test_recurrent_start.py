"""How recurrent routers start (RMoE §6.5, §7.4) and how large they are (§5)."""

import functools

import pytest
import torch
from torch import nn

from remoe import RouterContext, build_router
from remoe.moe.cells import share_cell


@functools.cache
def initial_logits(name, **options):
    """Logit standard deviation and sparsity at step 0 over 16 layers of width 1280 with 16 experts."""
    torch.manual_seed(0)
    options = options if name == "relu" else {"state_size": 128} | options
    routers = [build_router(name, 1280, 16, 4, init_std=0.02, **options) for _ in range(16)]
    share_cell(routers)
    state_TP, logits = None, []
    with torch.no_grad():
        for router in routers:
            hidden_TH = nn.functional.rms_norm(torch.randn(96, 1280), (1280,))
            routing = router(hidden_TH, RouterContext(state_TP=state_TP))
            state_TP = routing.state_TP
            logits.append(routing.logits_TE)
    logits = torch.stack(logits)
    return logits.std().item(), (logits <= 0).double().mean().item()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("recurrent_relu", {}),
        ("recurrent_relu", {"cell": "leaky"}),
        ("recurrent_relu", {"projector": "shared"}),
        ("recurrent_relu", {"input_residual": True}),
        ("rmoe", {"norm": "rms", "initial": "matched"}),
    ],
)
def test_logits_start_as_wide_as_a_linear_router_s_and_half_of_the_gates_open(name, options):
    linear_std, linear_sparsity = initial_logits("relu")
    std, sparsity = initial_logits(name, **options)
    assert std == pytest.approx(linear_std, rel=0.02)
    assert sparsity == pytest.approx(linear_sparsity, rel=0.02)
    assert linear_std == pytest.approx(0.716, rel=0.01)


@pytest.mark.parametrize(
    ("options", "ratio"), [({}, 17.0), ({"initial": "library", "bias": True}, 5.5)]
)  # RMoE §6.5's table: 17 to 15 with 0.02, 5.5 to 4.6 with torch's own values
def test_the_paper_s_own_start_is_many_times_flatter(options, ratio):
    std, _ = initial_logits("rmoe", **options)
    assert 0.716 / std == pytest.approx(ratio, rel=0.25)


def test_matched_biases_start_at_zero():
    router = build_router("recurrent_relu", 12, 6, 2, bias=True)
    assert not any(bias.any() for bias in (router.projector_bias, router.head_bias, router.cell.bias_hh))


# sizes


def count(num_layers, hidden, **options):
    with torch.device("meta"):
        routers = [build_router("rmoe", hidden, 16, 2, **options) for _ in range(num_layers)]
    cell = share_cell(routers)
    modules = [*routers, cell]
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


MEDIUM, SMALL = {"num_layers": 8, "hidden": 352, "bias": True}, {"num_layers": 6, "hidden": 264, "bias": True}
LARGE = {"num_layers": 24, "hidden": 1280}


@pytest.mark.parametrize(
    ("sizes", "options", "parameters"),
    [
        (MEDIUM, {}, 477_056),
        (MEDIUM, {"projector": "shared"}, 201_600),
        (MEDIUM, {"cell": "rnn"}, 411_008),
        (MEDIUM, {"cell": "lstm"}, 510_080),
        (MEDIUM, {"passing": "none"}, 477_056),
        (MEDIUM, {"passing": "none", "residual_coef": 0.5}, 477_056),
        (SMALL, {}, 15_608_701 - 15_293_725),
        (SMALL, {"projector": "shared"}, 15_457_405 - 15_293_725),
        (SMALL, {"cell": "rnn"}, 15_542_653 - 15_293_725),
        (SMALL, {"cell": "lstm"}, 15_641_725 - 15_293_725),
        (LARGE, {}, 4_080_384),
        (LARGE, {"state_size": 256}, 491_520 + 7_865_856),
        (LARGE, {"state_size": 512}, 491_520 + 17_009_664),
        (LARGE, {"state_size": 256, "cell": "rnn"}, 491_520 + 7_602_688),
        (LARGE, {"cell_bias": False}, 491_520 + 3_588_096),
        ({"num_layers": 12, "hidden": 264, "bias": True}, {}, 30_942_301 - 30_462_301 + 12 * (264 * 16 + 16)),
        ({"num_layers": 32, "hidden": 264, "bias": True}, {}, 82_054_301 - 80_939_421 + 32 * (264 * 16 + 16)),
    ],
)
def test_published_router_sizes(sizes, options, parameters):
    assert count(**sizes, **options) == parameters
