"""torchtitan's MoE with ReLU routing on a CPU; it runs in an environment of its own (docs/how-to/torchtitan.md)."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torchtitan", reason="needs torchtitan, which has no place beside remoe's other extras")

from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torchtitan.components.optimizer import default_adamw
from torchtitan.models.common.moe import MoE
from torchtitan.models.qwen3 import model_registry
from torchtitan.protocols.module import Module

from remoe.distributed.adapters.torchtitan import with_relu_routing
from remoe.distributed.adapters.torchtitan.moe import ReLUMoE
from remoe.errors import ConfigError
from remoe.moe import MoE as OurMoE
from remoe.moe import MoEConfig, losses

pytestmark = pytest.mark.heavy
TOKENS = 64
PAGE = (Path(__file__).resolve().parents[4] / "docs" / "how-to" / "torchtitan.md").read_text(encoding="utf-8")
ONE_PROCESS = SimpleNamespace(
    tp_enabled=False, ep_enabled=False, cp_enabled=False, pp_enabled=False, get_optional_mesh=lambda _: None
)


class PlainAttention(Module):
    """torchtitan's own attention has no backward pass on a CPU."""

    def forward(
        self, query: Any, key: Any, value: Any, *, scale: Any = None, enable_gqa: bool = False, **_: Any
    ) -> Any:
        heads = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=enable_gqa)
        return mixed.transpose(1, 2)


class PlainAttentionConfig(Module.Config):
    """Builds it."""

    def build(self, **_: Any) -> PlainAttention:
        return PlainAttention()


def small_spec() -> Any:
    """torchtitan's MoE debug model, with two layers of eight experts."""
    spec = model_registry("debugmodel_moe")
    spec.model = copy.deepcopy(spec.model)
    spec.model.layers = spec.model.layers[:2]
    for layer in spec.model.layers:
        layer.attention.inner_attention = PlainAttentionConfig()
        moe = layer.moe
        moe.num_experts = moe.router.num_experts = moe.router.gate.out_features = 8
        moe.routed_experts.inner_experts.num_experts = moe.routed_experts.token_dispatcher.num_experts = 8
        moe.router.top_k = moe.routed_experts.token_dispatcher.top_k = 2
    return spec


def built(spec: Any) -> Any:
    torch.manual_seed(0)
    model = spec.model.build()
    model.init_states(buffer_device=torch.device("cpu"))
    return model


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


def train(model: Any, spec: Any, steps: int) -> list[float]:
    optimizers = default_adamw(lr=3e-3).build(model_parts=[model])
    spec.post_optimizer_build_fn(optimizers, [model], ONE_PROCESS)
    tokens_BL = torch.randint(2048, (2, 33), generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(steps):
        logits_BLV = model(tokens_BL[:, :-1])
        loss = F.cross_entropy(logits_BLV.flatten(0, 1).float(), tokens_BL[:, 1:].flatten())
        optimizers.zero_grad()
        loss.backward()
        optimizers.step()
        found.append(loss.item())
    return found


def test_a_model_trains_and_its_coefficient_follows_the_density():
    spec = with_relu_routing(small_spec(), TOKENS)
    model = built(spec)
    found = train(model, spec, 6)
    assert found[-1] < 0.8 * found[0]
    layers = [module for module in model.modules() if isinstance(module, ReLUMoE)]
    assert len(layers) == 2
    for layer in layers:  # half of all gates are open at first, a quarter is the target
        torch.testing.assert_close(layer.log_coef.exp(), torch.tensor(1e-8 * 1.2**6, dtype=torch.float64))
        assert layer.routing_counts.sum() == 0


def test_a_large_coefficient_makes_routing_sparse():
    spec = with_relu_routing(small_spec(), TOKENS, init=1.0, multiplier=1.5)
    model = built(spec)
    train(model, spec, 12)
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
