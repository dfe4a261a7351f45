"""What goes with our routers in a Megatron model, and what is refused with one clear message."""

from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs the extra megatron")

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher

from remoe.distributed.adapters.megatron import Routers, RouterSettings
from remoe.distributed.adapters.megatron.dispatcher import VariableExpertsDispatcher
from remoe.errors import ConfigError
from tests.distributed.adapters.megatron.models import CPU, megatron_config, megatron_model

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("megatron")]
RECURRENT = RouterSettings(router={"name": "recurrent_relu", "state_size": 8})
IGNORED: list[tuple[dict[str, Any], str]] = [
    ({"moe_aux_loss_coeff": 0.01}, "moe_aux_loss_coeff is 0.01, must be 0 with router 'relu'"),
    ({"moe_z_loss_coeff": 1e-3}, "moe_z_loss_coeff is 0.001, must be None or 0.0"),
    ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor is 1.0, must be None"),
    ({"moe_router_topk_scaling_factor": 2.0}, "moe_router_topk_scaling_factor is 2.0, must be None"),
    ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function is 'sigmoid', must be 'softmax'"),
    ({"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}, "moe_router_"),
    ({"moe_router_num_groups": 2, "moe_router_group_topk": 1}, "moe_router_num_groups is 2, must be None"),
    ({"moe_input_jitter_eps": 0.1}, "moe_input_jitter_eps is 0.1, must be None"),
    ({"moe_router_force_load_balancing": True}, "moe_router_force_load_balancing is True, must be False"),
    ({"moe_apply_probs_on_input": True}, "moe_apply_probs_on_input is True, must be False"),
    ({"moe_token_dispatcher_type": "flex"}, "moe_token_dispatcher_type is 'flex', must be 'alltoall' or 'allgather'"),
    ({"mtp_num_layers": 1}, "mtp_num_layers is 1, must be None or 0"),
]


@pytest.mark.parametrize(("changes", "message"), IGNORED)
def test_options_that_would_be_ignored_are_refused(changes: dict[str, Any], message: str):
    config = megatron_config()
    for key, value in changes.items():  # after Megatron's own checks, which refuse some on a CPU
        setattr(config, key, value)
    with pytest.raises(ConfigError, match=message):
        Routers(config, device=CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline_model_parallel_size": 2}, "must be 1 with router 'recurrent_relu': Megatron sends no router state"),
        ({"recompute_granularity": "selective", "recompute_modules": ["moe"]}, "must be without 'moe'"),
        ({"cuda_graph_impl": "local"}, "cuda_graph_impl is 'local', must be 'none'"),
    ],
)
def test_recurrent_routers_refuse_what_loses_their_state(changes: dict[str, Any], message: str):
    config = megatron_config()
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(ConfigError, match=message):
        Routers(config, RECURRENT, device=CPU)
    Routers(config, device=CPU)  # ReLU routing goes with each of them


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "rleu"}, "router is 'rleu'.*did you mean 'relu'"),
        ({"router": "topk"}, "router is 'topk', must be one of relu"),
        ({"mode": "papers"}, "mode is 'papers'"),
        ({"loads": "previous_step"}, "loads is 'previous_step'"),
        ({"router": {"name": "relu", "scale": 1}}, "router 'relu' has no option 'scale'"),
        ({"init": 0.0}, "init is 0.0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        Routers(megatron_config(), RouterSettings(**settings), device=CPU)


def test_a_dense_model_is_refused():
    config = megatron_config()
    config.num_moe_experts = None
    with pytest.raises(ConfigError, match="num_moe_experts is None"):
        Routers(config, device=CPU)


def test_a_spec_of_another_layer_is_refused():
    spec = get_gpt_layer_local_spec(num_experts=4)
    spec.module = torch.nn.Linear
    with pytest.raises(ConfigError, match=r"must be one of .*TransformerLayer"):
        Routers(megatron_config(), device=CPU).layer_spec(spec)


def test_the_given_spec_is_left_as_it_was():
    spec = get_gpt_layer_local_spec(num_experts=4)
    before = spec.submodules.mlp.submodules.router
    Routers(megatron_config(), device=CPU).layer_spec(spec)
    assert spec.submodules.mlp.submodules.router is before


def test_the_dispatcher_is_told_the_number_of_rows_before_it_permutes():
    model = megatron_model(config := megatron_config(), Routers(config, device=CPU))
    dispatcher = model.decoder.layers[0].mlp.token_dispatcher
    assert isinstance(dispatcher, VariableExpertsDispatcher)
    routing_map_TE = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    per_expert_E = dispatcher.preprocess(routing_map_TE)
    assert int(dispatcher.num_out_tokens) == 4  # Megatron takes 3 tokens times k for granted
    assert dispatcher.cuda_sync_point == "before_permutation_1"
    assert per_expert_E.tolist() == [1, 2, 1, 0]


def test_the_all_gather_dispatcher_is_left_alone():
    config = megatron_config(moe_token_dispatcher_type="allgather")
    model = megatron_model(config, Routers(config, device=CPU))
    assert type(model.decoder.layers[0].mlp.token_dispatcher) is MoEAllGatherTokenDispatcher
