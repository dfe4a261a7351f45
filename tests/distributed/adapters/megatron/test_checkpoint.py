"""A model with our routers saved by megatron-core itself, with Megatron's coefficient file, and read without it."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs the extra megatron")

from megatron.core import dist_checkpointing

from remoe.convert.megatron import from_megatron
from remoe.distributed.adapters.megatron import RouterSettings
from tests.distributed.adapters.megatron.models import logits_of, megatron_config, routed_model, tokens

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("megatron")]
ROUTERS: dict[str, Any] = {"relu": None, "recurrent": {"name": "recurrent_relu", "state_size": 8}}


def arguments(config: Any) -> argparse.Namespace:
    """What Megatron's training script saves beside the model."""
    return argparse.Namespace(
        **vars(config), rotary_base=10_000, norm_epsilon=config.layernorm_epsilon, swiglu=True,
        group_query_attention=True, position_embedding_type="rope", moe_relu_routing=True,
    )  # fmt: skip


@pytest.mark.parametrize("frequency", [1, [1, 0, 1]])
@pytest.mark.parametrize("name", ROUTERS)
def test_what_megatron_saves_is_our_model(tmp_path: Path, name: str, frequency: Any):
    config = megatron_config(moe_layer_freq=frequency, params_dtype=torch.float32)
    router = ROUTERS[name]
    model, routers = routed_model(config, RouterSettings(router=router or "relu"))
    state: dict[str, Any] = dict(model.sharded_state_dict())
    args = argparse.Namespace(**{k: v for k, v in vars(arguments(config)).items() if not callable(v)})
    dist_checkpointing.save({**state, "args": args, "iteration": 7, "routers": routers.state_dict()}, str(tmp_path))

    ours = from_megatron(tmp_path, router=router)
    assert ours.iteration == 7
    tokens_BS = tokens()
    torch.testing.assert_close(ours.model(tokens_BS).logits, logits_of(model.eval(), tokens_BS), rtol=1e-5, atol=1e-5)

    common = dist_checkpointing.load_common_state_dict(str(tmp_path))
    routers.controller.log_coef.zero_()
    routers.load_state_dict(common["routers"])
    assert float(routers.coef) == pytest.approx(1e-8)
