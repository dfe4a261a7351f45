"""Facts about initial values."""

import pytest
import torch

from remoe.model.init import initial_values


def common(model, other):
    left, right = dict(model.named_parameters()), dict(other.named_parameters())
    return {name: (left[name], right[name]) for name in left if name in right and left[name].shape == right[name].shape}


def test_models_that_differ_in_the_router_share_every_parameter_bit_for_bit(build):
    pairs = common(build(router="relu", seed=7), build(router="topk", seed=7))
    assert len(pairs) == len(list(build().parameters()))
    assert all(torch.equal(left, right) for left, right in pairs.values())


def test_a_dense_model_shares_all_but_the_experts(build):
    pairs = common(build(moe_layers="all"), build(moe_layers="none"))
    assert len(pairs) == 3 * 6 + 3
    assert all(torch.equal(left, right) for left, right in pairs.values())


def test_the_seed_and_the_name_both_matter(build):
    pairs = common(build(seed=0), build(seed=1))
    same = {name for name, (left, right) in pairs.items() if torch.equal(left, right)}
    assert same == {name for name in pairs if name.endswith("norm.weight")}
    model = build()
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, model.model.layers[1].self_attn.q_proj.weight)


def test_values_do_not_depend_on_the_global_generator(build):
    torch.manual_seed(1)
    first = build()
    torch.manual_seed(2)
    assert all(torch.equal(left, right) for left, right in common(first, build()).values())


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("model.embed_tokens.weight", 0.2),
        ("model.layers.0.self_attn.q_proj.weight", 0.2),
        ("model.layers.0.mlp.experts.gate_up_proj", 0.2),
        ("model.layers.0.self_attn.o_proj.weight", 0.2 / 6**0.5),
        ("model.layers.1.mlp.down_proj.weight", 0.2 / 6**0.5),
        ("model.layers.0.mlp.experts.down_proj", 0.2 / 6**0.5),
    ],
)
def test_output_projections_are_scaled_by_depth(build, name, std):
    parameter = build(hidden_size=64).get_parameter(name)
    assert parameter.std().item() == pytest.approx(std, rel=0.05)
    assert parameter.mean().item() == pytest.approx(0, abs=0.02)


def test_norms_start_at_one(build):
    norms = [parameter for name, parameter in build().named_parameters() if name.endswith("norm.weight")]
    assert len(norms) == 7
    assert all((norm == 1).all() for norm in norms)


def test_values_of_one_name_never_change_between_versions(build):
    expected = [-0.10132346302270889, 0.21878230571746826, 0.4746852517127991]
    config = build().config
    with torch.device("meta"):  # a default device does not matter
        model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(3, 1, bias=False)})
        ((_, values),) = initial_values(model, config, seed=0)
    torch.testing.assert_close(values[0], torch.tensor(expected), rtol=1e-5, atol=1e-7)
