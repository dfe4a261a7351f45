"""The sparsity coefficient of a Megatron model, against the defects of ReMoE's released code (spec §6)."""

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs the extra megatron")

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_layer import MoELayer

from remoe.distributed.adapters.megatron import Routers, RouterSettings
from tests.distributed.adapters.megatron.models import (
    CPU,
    LENGTH,
    gradients,
    logits_of,
    loss_of,
    megatron_config,
    megatron_model,
    routed_model,
    tokens,
    train_micro_batch,
)

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("megatron")]
RECOMPUTE: dict[str, dict[str, Any]] = {
    "kept": {},
    "layers": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 3},
    "some layers": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "experts": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


def routers_of(model: torch.nn.Module) -> list[Any]:
    return [module.router for module in model.modules() if isinstance(module, MoELayer)]


def open_all(model: torch.nn.Module, is_open: bool = True) -> None:
    """Make every gate of every token positive, or none: a router of zeros closes all."""
    for router in routers_of(model):
        torch.nn.init.zeros_(router.weight)
        if is_open:
            router.register_forward_pre_hook(lambda module, inputs: (inputs[0].abs(), *inputs[1:]))
            torch.nn.init.ones_(router.weight)


def step(model: Any, routers: Routers, **inputs: Any) -> None:
    train_micro_batch(model, tokens(), **inputs)
    routers.after_optimizer_step()


def test_a_dense_step_raises_and_an_idle_one_lowers_the_coefficient():
    model, routers = routed_model()
    open_all(model)
    step(model, routers)
    torch.testing.assert_close(routers.coef, torch.tensor(1.2e-8))
    assert routers.metrics()["sparsity"] == 0
    open_all(model, is_open=False)
    for _ in range(2):
        step(model, routers)
    torch.testing.assert_close(routers.coef, torch.tensor(1e-8 / 1.2))
    assert routers.metrics()["sparsity"] == 1


def test_the_coefficient_is_changed_in_place_where_the_routers_read_it():
    model, routers = routed_model(settings=RouterSettings(init=1.0))
    train_micro_batch(model, tokens())
    before = [gradient.clone() for name, gradient in gradients(model).items() if "router" in name]
    routers.load_state_dict({"log_coef": torch.tensor(5.0).log().double()})
    model.zero_grad()
    train_micro_batch(model, tokens())
    after = [gradient for name, gradient in gradients(model).items() if "router" in name]
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(after, before, strict=True))


def test_nothing_in_an_update_waits_for_the_device():
    routers = Routers(megatron_config(), device=torch.device("meta"))
    routers.after_optimizer_step(updated=torch.ones((), dtype=torch.bool, device="meta"))  # a read would raise
    assert routers.coef.is_meta


def test_the_coefficient_stays_within_its_bounds():
    _, routers = routed_model(settings=RouterSettings(max_coef=10.0, min_coef=1e-12))
    for row, bound in ((4, 10.0), (0, 1e-12)):
        for _ in range(300):
            routers.counts.rows_LE1[:] = torch.tensor([row] * 4 + [4])
            routers.after_optimizer_step()
        torch.testing.assert_close(routers.coef, torch.tensor(bound))


def test_dense_layers_do_not_count_towards_the_sparsity():
    config = megatron_config(num_layers=4, moe_layer_freq=[1, 0, 0, 1])
    model, routers = routed_model(config)
    open_all(model)
    step(model, routers)
    metrics = routers.metrics()
    assert metrics["sparsity"] == 0
    assert metrics["layer_sparsity"].isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recomputation_counts_and_penalises_once(recompute: str):
    found = {}
    for name in ("kept", recompute):
        settings = RouterSettings(init=0.5)
        model, routers = routed_model(megatron_config(moe_router_topk=2, **RECOMPUTE[name]), settings)
        train_micro_batch(model, tokens())
        found[name] = (routers.counts.rows_LE1.clone(), gradients(model))
    counts, expected = found["kept"]
    assert torch.equal(found[recompute][0], counts)
    assert counts[:, -1].tolist() == [tokens().numel()] * 3
    for name, gradient in found[recompute][1].items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12)


def test_evaluation_and_forward_passes_without_a_backward_count_nothing():
    model, routers = routed_model()
    logits_of(model.eval(), tokens())
    with torch.no_grad():
        logits_of(model.train(), tokens())
    logits_of(model, tokens())
    assert routers.counts.rows_LE1.sum() == 0


def test_a_step_run_again_does_not_change_the_decision():
    coefficients = []
    for runs in (1, 2):
        model, routers = routed_model()
        for _ in range(runs):
            train_micro_batch(model, tokens())
        routers.after_optimizer_step()
        coefficients.append(float(routers.coef))
        torch.testing.assert_close(routers.metrics()["sparsity"], torch.tensor(0.5), atol=0.3, rtol=0)
    assert coefficients[0] == coefficients[1] != 1e-8


@pytest.mark.parametrize("updated", [False, torch.tensor(False)])
def test_a_skipped_step_leaves_the_coefficient_alone_and_is_forgotten(updated: Any):
    model, routers = routed_model()
    train_micro_batch(model, tokens())
    routers.after_optimizer_step(updated)
    assert float(routers.coef) == pytest.approx(1e-8)
    assert routers.counts.rows_LE1.sum() == 0


def test_at_the_target_the_paper_holds_and_the_released_code_lowers():
    for mode, expected in (("paper", 1e-8), ("released", 1e-8 / 1.2)):
        _, routers = routed_model(settings=RouterSettings(mode=mode))
        routers.counts.rows_LE1[:] = torch.tensor([2, 1, 1, 0, 4])  # 4 of 16 pairs: a quarter, k/E
        routers.after_optimizer_step()
        assert float(routers.coef) == pytest.approx(expected)


def test_counts_are_exact_where_bf16_sums_are_not():
    _, routers = routed_model()
    for active, moved in ((8197, 1.2), (8196, 1.0), (8195, 1 / 1.2)):
        routers.load_state_dict({"log_coef": torch.tensor(1e-8).double().log()})
        routers.counts.rows_LE1[0] = torch.tensor([active, 0, 0, 0, 8196])
        routers.after_optimizer_step()
        assert float(routers.coef) == pytest.approx(1e-8 * moved)


def test_padding_is_neither_routed_nor_counted_nor_penalised():
    model, routers = routed_model(settings=RouterSettings(init=0.5))
    padding_BS = torch.zeros(2, LENGTH, dtype=torch.bool)
    padding_BS[1, 5:] = True
    layer = routers_of(model)[0]
    hidden_SBH = torch.randn(LENGTH, 2, 16, dtype=torch.float64)
    weights_TE, map_TE = layer(hidden_SBH, padding_BS.T)
    masked_T = padding_BS.T.flatten()
    assert not map_TE[masked_T].any()
    assert weights_TE[masked_T].abs().sum() == 0
    weights_TE.sum().backward()
    assert routers.counts.rows_LE1[0, -1] == 2 * LENGTH - 3
    train_micro_batch(model, tokens(), padding_mask_BS=padding_BS)
    assert routers.counts.rows_LE1[1:, -1].tolist() == [2 * LENGTH - 3] * 2


def test_models_built_from_copies_of_the_config_and_the_spec_share_one_coefficient():
    routers = Routers(megatron_config(), device=CPU)
    chunks = [megatron_model(megatron_config(), routers) for _ in range(2)]  # as chunks of a virtual pipeline are
    assert chunks[0].config is not chunks[1].config
    found = [router for chunk in chunks for router in routers_of(chunk)]
    assert len(found) == 6
    assert all(router.penalties.coef is routers.coef for router in found)
    for chunk in chunks:
        open_all(chunk)
        train_micro_batch(chunk, tokens())
    routers.after_optimizer_step()
    torch.testing.assert_close(routers.coef, torch.tensor(1.2e-8))
    assert routers.last_step.rows_LE1[:, -1].tolist() == [2 * tokens().numel()] * 3
    spec = copy.deepcopy(routers.layer_spec(one_layer_spec()))
    assert spec.submodules.mlp.submodules.router.args == (routers,)


def one_layer_spec() -> Any:
    return get_gpt_layer_local_spec(num_experts=4, normalization="RMSNorm")


def test_casting_the_model_to_bf16_leaves_coefficient_gates_and_logits_in_fp32():
    config = megatron_config(params_dtype=torch.float32, bf16=True)
    model, routers = routed_model(config)
    Float16Module(config, model)
    router = routers_of(model)[0]
    assert router.weight.dtype == torch.bfloat16
    weights_TE, _ = router(torch.randn(LENGTH, 2, 16, dtype=torch.bfloat16))
    assert weights_TE.dtype == routers.coef.dtype == torch.float32


def test_the_state_is_saved_and_loaded_and_not_part_of_the_models():
    model, routers = routed_model()
    for _ in range(3):
        open_all(model)
        step(model, routers)
    again = Routers(megatron_config(), device=CPU)
    again.load_state_dict(copy.deepcopy(routers.state_dict()))
    assert torch.equal(again.coef, routers.coef)
    plain = megatron_model(megatron_config())  # Megatron's own Top-K router
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.load_state_dict(plain.state_dict(), strict=True)


def test_a_layer_without_any_active_expert_gives_zeros_and_zero_gradients():
    model, routers = routed_model(settings=RouterSettings(init=0.5))
    open_all(model, is_open=False)
    tokens_BS = tokens()
    loss_of(logits_of(model, tokens_BS), tokens_BS).backward()
    found = gradients(model)
    experts = [name for name in found if ".mlp." in name]
    assert experts
    assert all(found[name].abs().max() == 0 for name in experts)
    assert routers.counts.rows_LE1.sum(0).tolist() == [0, 0, 0, 0, 3 * tokens_BS.numel()]


def test_micro_batches_are_a_mean_not_a_sum():
    settings = RouterSettings(init=0.5)
    found = []
    for num_micro_batches in (1, 4):
        model, _ = routed_model(settings=settings)
        for _ in range(num_micro_batches):
            train_micro_batch(model, tokens(), num_micro_batches)
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-10, atol=1e-12)


def term_gradient(settings: RouterSettings, **changes: Any) -> torch.Tensor:
    """The first router's gradient of the auxiliary term alone, over 2 * LENGTH tokens."""
    model, _ = routed_model(megatron_config(**changes), settings)
    router = routers_of(model)[0]
    hidden_SBH = torch.randn(LENGTH, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    router(hidden_SBH)[0].mul(0).sum().backward()
    return router.weight.grad


def test_the_released_term_is_a_sum_over_layers_the_papers_a_mean():
    paper, released = (term_gradient(RouterSettings(init=0.5, mode=mode)) for mode in ("paper", "released"))
    torch.testing.assert_close(released, 3 * paper)


def test_per_token_loss_scales_the_term_by_the_tokens_that_megatron_divides_by():
    settings = RouterSettings(init=0.5)
    mean, per_token = (term_gradient(settings, calculate_per_token_loss=flag) for flag in (False, True))
    torch.testing.assert_close(per_token, mean * 2 * LENGTH)
