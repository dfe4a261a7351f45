"""torchtitan's MoE with ReLU routing on a CPU; it runs in an environment of its own (docs/how-to/torchtitan.md)."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("torchtitan", reason="needs torchtitan, which has no place beside remoe's other extras")

from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torchtitan.models.common.moe import MoE
from torchtitan.models.qwen3 import model_registry

from remoe.distributed.adapters.torchtitan import with_relu_routing
from remoe.distributed.adapters.torchtitan.moe import ReLUMoE
from remoe.errors import ConfigError
from remoe.moe import MoE as OurMoE
from remoe.moe import MoEConfig, losses
from tests.distributed.adapters.torchtitan.models import ONE_PROCESS, batch, built, small_spec, train
from tests.distributed.conftest import torchrun

pytestmark = pytest.mark.heavy
TOKENS = 64
PAGE = (Path(__file__).resolve().parents[4] / "docs" / "how-to" / "torchtitan.md").read_text(encoding="utf-8")


def one_layer(**settings: Any) -> ReLUMoE:
    spec = with_relu_routing(small_spec(), TOKENS, **settings)
    layer = spec.model.layers[0].moe.build()
    torch.manual_seed(0)
    layer.init_states(buffer_device=torch.device("cpu"))
    return layer


def ours_like(layer: ReLUMoE) -> OurMoE:
    """Our layer with the same weights."""
    experts = layer.routed_experts.inner_experts
    num_experts, width, hidden_size = experts.w1_EFD.shape
    config = MoEConfig(hidden_size=hidden_size, intermediate_size=width, num_experts=num_experts, top_k=layer.top_k)
    ours = OurMoE(config)
    with torch.no_grad():
        ours.router.weight.copy_(layer.router.gate.weight)
        ours.experts.gate_up_proj.copy_(torch.cat((experts.w1_EFD, experts.w3_EFD), dim=1))
        ours.experts.down_proj.copy_(experts.w2_EDF)
    return ours


def test_the_layer_gives_the_output_of_ours_up_to_its_bf16_experts():
    layer = one_layer()
    x_BLD = torch.randn(2, 32, 256)
    expected, routing = ours_like(layer)(x_BLD)
    found = layer(x_BLD)
    assert routing.routing_map_TE.sum() != TOKENS * layer.top_k
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 0.02, error


def test_only_rows_of_active_experts_are_computed():
    layer = one_layer()
    rows = []
    layer.routed_experts.inner_experts.register_forward_pre_hook(lambda _, inputs: rows.append(inputs))
    layer(torch.randn(2, 32, 256))
    assert rows[0][0].shape[0] == int(rows[0][1].sum()) < TOKENS * 8


def test_the_term_reaches_the_router_with_torchtitans_normalisation():
    layer = one_layer(init=0.5)
    x_BLD = torch.randn(2, 16, 256)  # half of a step's tokens: a micro-batch of two
    ours = ours_like(layer)
    _, routing = ours(x_BLD)
    (0.5 / 2 * losses.sparsity_l1(routing, 2) / 2).backward()  # mean of two layers, half of the step
    (0 * layer(x_BLD)).sum().backward()
    torch.testing.assert_close(layer.router.gate.weight.grad, ours.router.weight.grad, rtol=1e-5, atol=1e-8)


def test_a_token_without_experts_and_an_idle_layer_give_zeros():
    layer = one_layer(init=0.5)
    torch.nn.init.zeros_(layer.router.gate.weight)
    out_BLD = layer(torch.randn(2, 32, 256))
    out_BLD.sum().backward()
    assert out_BLD.abs().max() == 0
    assert layer.routed_experts.inner_experts.w1_EFD.grad.abs().max() == 0
    assert layer.routing_counts.tolist() == [0] * 8 + [TOKENS]


def test_a_model_trains_and_its_coefficient_follows_the_density():
    spec = with_relu_routing(small_spec(), TOKENS)
    model = built(spec)
    found = train(model, spec, 6, batch(), TOKENS)
    assert found[-1] < 0.8 * found[0]
    layers = [module for module in model.modules() if isinstance(module, ReLUMoE)]
    assert len(layers) == 2
    for layer in layers:  # half of all gates are open at first, a quarter is the target
        torch.testing.assert_close(layer.log_coef.exp(), torch.tensor(1e-8 * 1.2**6, dtype=torch.float64))
        assert layer.routing_counts.sum() == 0


def test_a_large_coefficient_makes_routing_sparse():
    spec = with_relu_routing(small_spec(), TOKENS, init=1.0, multiplier=1.5)
    model = built(spec)
    train(model, spec, 12, batch(), TOKENS)
    counts = []
    for layer in (module for module in model.modules() if isinstance(module, ReLUMoE)):
        layer.register_full_backward_hook(lambda module, *_: counts.append(module.routing_counts.clone()))
    model(torch.randint(2048, (2, 32))).sum().backward()
    density = sum(int(c[:-1].sum()) for c in counts) / sum(int(c[-1]) * 8 for c in counts)
    assert density < 0.35


def test_recomputed_blocks_count_once():
    spec = with_relu_routing(small_spec(), TOKENS)
    found = []
    for recompute in (False, True):
        model = built(spec)
        for name, block in list(model.layers.items()):
            model.layers[name] = checkpoint_wrapper(block) if recompute else block
        model(torch.randint(2048, (2, 32), generator=torch.Generator().manual_seed(2))).sum().backward()
        found.append([m.routing_counts for m in model.modules() if isinstance(m, ReLUMoE)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(counts[-1] == TOKENS for counts in found[0])


def test_parameters_keep_torchtitans_names_and_the_coefficient_is_saved():
    plain, routed = built(small_spec()), built(with_relu_routing(small_spec(), TOKENS))
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in routed.named_parameters()]
    only_here = routed.state_dict().keys() - plain.state_dict().keys()
    assert only_here == {"layers.0.moe.log_coef", "layers.1.moe.log_coef"}


def test_the_given_spec_is_left_as_it_was():
    spec = small_spec()
    with_relu_routing(spec, TOKENS)
    assert all(type(config) is MoE.Config for _, config, _, _ in spec.model.traverse(MoE.Config))


@pytest.mark.parametrize("kind", ["tp", "ep", "cp", "pp"])
def test_other_parallelism_is_refused(kind: str):
    spec = with_relu_routing(small_spec(), TOKENS)
    dims = SimpleNamespace(**(vars(ONE_PROCESS) | {f"{kind}_enabled": True}))
    with pytest.raises(ConfigError, match=f"{kind} parallelism is on, must be off"):
        spec.post_optimizer_build_fn(None, [], dims)


def test_buffers_as_dtensors_are_refused():
    spec = with_relu_routing(small_spec(), TOKENS)
    dims = SimpleNamespace(**(vars(ONE_PROCESS) | {"spmd_backend": "full_dtensor"}))
    with pytest.raises(ConfigError, match="must be 'spmd_types' or 'partial_dtensor'"):
        spec.post_optimizer_build_fn(None, [], dims)


def test_a_dense_model_is_refused():
    with pytest.raises(ConfigError, match="has no MoE layers"):
        with_relu_routing(model_registry("debugmodel"), TOKENS)


def test_routing_that_relu_replaces_is_refused():
    spec = small_spec()
    spec.model.layers[0].moe.router.route_scale = 2.5
    with pytest.raises(ConfigError, match="scales its scores"):
        with_relu_routing(spec, TOKENS)


def test_the_config_of_the_page_is_one_with_relu_routing():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    config = names["relu_debug"]()
    layers = [layer for _, layer, _, _ in config.model_spec.model.traverse(MoE.Config)]
    assert len(layers) == 8
    assert all(isinstance(layer, ReLUMoE.Config) for layer in layers)
    assert layers[0].tokens_per_step == 8 * config.training.seq_len
    assert config.training.disable_cuda_graphs


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_torchtitans_own_trainer_trains_it_alone_and_under_fsdp(tmp_path: Path, processes: int):
    finished = torchrun(processes, "-m", "tests.distributed.adapters.torchtitan.trainer", str(tmp_path), timeout=240)
    assert finished.returncode == 0, finished.stderr[-4000:]
    found, *others = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(processes))
    assert all(other == found for other in others)
    assert len(found["losses"]) == 4
    assert found["losses"][-1] < 0.9 * found["losses"][0]
    first, second = found["coefficients"]
    assert first == second
    steps = math.log(first / 0.3) / math.log(1.2)  # each of four went up or down
    assert round(steps) in (-4, -2, 0, 2, 4)
    assert steps == pytest.approx(round(steps), abs=1e-9)


@pytest.mark.slow
def test_two_data_ranks_under_fsdp_train_as_one_process_with_their_rows(tmp_path: Path):
    finished = torchrun(2, "-m", "tests.distributed.adapters.torchtitan.worker", str(tmp_path / "found"), timeout=240)
    assert finished.returncode == 0, finished.stderr[-4000:]
    found = json.loads((tmp_path / "found").read_text())
    whole, (first, second) = found["whole"], found["ranks"]
    assert first["coefficients"] == second["coefficients"] == whole["coefficients"]
    assert first["routers"] == second["routers"]
    together = [sum(losses) for losses in zip(first["losses"], second["losses"], strict=True)]
    assert together == pytest.approx(whole["losses"], rel=1e-3)  # experts compute in bf16
