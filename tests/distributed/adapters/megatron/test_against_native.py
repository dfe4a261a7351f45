"""The same weights in Megatron's model and in ours: the same logits, losses, gradients and coefficient."""

from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs the extra megatron")

from remoe.convert.megatron.names import to_native
from remoe.distributed.adapters.megatron import RouterSettings
from remoe.moe import losses
from tests.distributed.adapters.megatron.models import (
    gradients,
    logits_of,
    loss_of,
    megatron_config,
    native_config,
    native_model,
    routed_model,
    tokens,
    train_micro_batch,
)

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("megatron")]
RECURRENT = {"name": "recurrent_relu", "state_size": 8}
ROUTERS: dict[str, Any] = {
    "relu": "relu",
    "relu with normalised gates": {"name": "relu", "normalize": True},
    "recurrent relu": RECURRENT,
    "recurrent top-k": {"name": "rmoe", "state_size": 8},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "all layers": {},
    "in fp32": {"params_dtype": torch.float32},
    "all-gather": {"moe_token_dispatcher_type": "allgather"},
    "a dense layer between": {"moe_layer_freq": [1, 0, 1]},
    "recomputed layers": {
        "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
    },
}  # fmt: skip
COEFFICIENT = 0.3
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-5}  # in fp64 too both compute rotary angles in fp32
AMPLIFIED = 8
"""In fp32 gradients may be this many times as far apart as ours are from those in fp64: normalised gates divide by
their rms, which for some tokens is near 0, and enlarge what rounding leaves, in either program.
"""


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> Any:
    return megatron_config(moe_router_topk=2, **CONFIGS[request.param])


@pytest.fixture(params=ROUTERS)
def router(request: pytest.FixtureRequest) -> Any:
    return ROUTERS[request.param]


def balance(config: Any, router: Any) -> Any:
    """With load balancing where the router is trained with it."""
    config.moe_aux_loss_coeff = COEFFICIENT if router == ROUTERS["recurrent top-k"] else 0.0
    return config


def native_loss(model: Any, config: Any, router: Any, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Language-model loss and weighted penalty, written down once more: the mean of L1, the sum of load balancing."""
    output = model(tokens_BS)
    routings = [routing for routing in output.routings if routing is not None]
    if config.moe_aux_loss_coeff:
        penalty = sum(losses.load_balancing(routing, config.moe_router_topk) for routing in routings)
    else:
        penalty = sum(losses.sparsity_l1(routing, config.moe_router_topk) for routing in routings) / len(routings)
    return loss_of(output.logits, tokens_BS) + COEFFICIENT * penalty


def test_outputs_and_all_gradients_are_those_of_our_model(config: Any, router: Any):
    settings = RouterSettings(router=router, init=COEFFICIENT)
    theirs, _ = routed_model(balance(config, router), settings)
    own_config = native_config(config, router)
    ours = native_model(own_config, to_native(theirs.state_dict(), own_config))
    tokens_BS = tokens()

    close = {"rtol": 10 * TOLERANCES[config.params_dtype], "atol": TOLERANCES[config.params_dtype]}
    active = [int(r.routing_map_TE.sum()) for r in ours(tokens_BS).routings if r is not None]
    tokens_times_k = tokens_BS.numel() * config.moe_router_topk
    if settings.name != "rmoe":
        assert any(pairs != tokens_times_k for pairs in active), "numbers of experts vary"
    torch.testing.assert_close(logits_of(theirs, tokens_BS), ours(tokens_BS).logits, **close)

    train_micro_batch(theirs, tokens_BS)
    native_loss(ours, config, router, tokens_BS).backward()
    found, expected = to_native(gradients(theirs), own_config), gradients(ours)
    assert found.keys() == expected.keys()
    wide = native_model(own_config, to_native(theirs.state_dict(), own_config)).double()
    native_loss(wide, config, router, tokens_BS).backward()
    rounding = max(relative_error(expected[name], gradient) for name, gradient in gradients(wide).items())
    for name, gradient in expected.items():
        bounds = close | {"atol": close["atol"] + AMPLIFIED * rounding * float(gradient.abs().max())}
        torch.testing.assert_close(found[name], gradient, **bounds, msg=lambda text, n=name: f"{n}: {text}")


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())
