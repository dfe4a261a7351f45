"""The wiki100-k2 recipes: one arm a router, differing in the router alone, all with logits of one width at first."""

import dataclasses
import statistics

import pytest
import torch

from remoe.config import to_dict
from remoe.moe import MoE
from remoe.moe.routing import RouterContext
from remoe.recipes import names, read_config, show
from remoe.recipes.catalog import load
from remoe.recipes.plan import Plan, differing_settings, trials

ARMS = [name for name in names() if name.startswith("wiki100-k2-")]
RELU_GATES = ("relu", "recurrent-relu", "recurrent-np", "recurrent-leaky", "normalized", "revived")
REQUIRED = (
    "topk", "renormalized", "relu", "rmoe", "rmoe-np", "rmoe-detach", "rmoe-leaky", "recurrent-relu",
    "recurrent-leaky", "mlp", "cosine", "xmoe",
)  # fmt: skip
OWN_SCALE = ("wiki100-k2-hash", "wiki100-k2-rmoe-library")
LINEAR_LOGIT_STD = 0.014 * 384**0.5


def router_of(name):
    model = read_config(name).model
    return MoE(dataclasses.replace(model.moe, intermediate_size=1)).router


def test_issue_4s_arms_are_there():
    assert {f"wiki100-k2-{arm}" for arm in REQUIRED} <= set(ARMS)


@pytest.mark.parametrize("arm", ARMS)
def test_arm_differs_from_plain_topk_in_its_router_and_what_it_is_named_after(arm):
    plan = Plan(name="c", config="wiki100-k2-topk", routers=["wiki100-k2-topk", *[arm][: arm != "wiki100-k2-topk"]])
    changed = differing_settings(trials(plan))[arm]
    own = {"wiki100-k2-unbalanced": {"losses.load_balancing_coef"},
           "wiki100-k2-revived": {"sparsity.density_floor", "sparsity.revival_coef"}}.get(arm, set())  # fmt: skip
    assert {key for key in changed if not key.startswith("model.router")} == own
    assert show(arm).startswith("# Ours")


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in OWN_SCALE])
def test_logits_start_as_wide_as_the_linear_routers(arm):
    torch.manual_seed(0)
    hidden_TH = torch.randn(4096, 384)
    hidden_TH = hidden_TH / hidden_TH.square().mean(-1, keepdim=True).sqrt()
    with torch.no_grad():
        stds = [router_of(arm)(hidden_TH, RouterContext()).logits_TE.std().item() for _ in range(8)]
    assert statistics.fmean(stds) == pytest.approx(LINEAR_LOGIT_STD, rel=0.05)


@pytest.mark.parametrize("arm", ARMS)
def test_softmax_gates_are_renormalised_as_the_recipe_says_and_trained_with_balance(arm):
    router, config = router_of(arm), read_config(arm)
    if arm.removeprefix("wiki100-k2-") in RELU_GATES:
        assert router.penalty == "sparsity_l1"
        assert config.sparsity.load_balanced
    elif arm != "wiki100-k2-hash":
        assert router.penalty == ("none" if arm == "wiki100-k2-loss-free" else "load_balancing")
        assert router.renormalize is (arm != "wiki100-k2-topk")
        assert config.losses.load_balancing_coef == (0.0 if arm == "wiki100-k2-unbalanced" else 0.01)


def test_every_recurrent_arm_states_its_scale_and_width():
    routers = [load(arm)["model"]["router"] for arm in ARMS]
    recurrent = [
        router for router in routers if isinstance(router, dict) and router["name"] in ("rmoe", "recurrent_relu")
    ]
    assert len(recurrent) >= 9
    for router in recurrent:
        assert {"state_size", "norm", "initial"} <= router.keys()


def test_arms_have_one_set_of_batches():
    first, *others = (to_dict(read_config(arm)) for arm in ARMS)
    for other in others:
        assert all(first[key] == other[key] for key in ("seed", "data", "optimizer", "train"))
