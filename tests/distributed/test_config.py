"""The `parallel:` section and what does not fit it."""

from typing import Any

import pytest

from remoe.config import from_dict
from remoe.distributed.config import ParallelConfig, check_experts, check_sequence, own_micro_batch, resolve_parallel
from remoe.errors import ConfigError
from remoe.model import ReMoEConfig


def resolved(world_size: int, **sizes: int | str) -> ParallelConfig:
    return resolve_parallel(from_dict(ParallelConfig, sizes), world_size)


def test_shards_are_what_copies_leave():
    assert resolved(8).data_shard == 8
    assert resolved(8, data_replicate=2).data_shard == 4
    assert resolved(8, data_replicate=2, data_shard=4, expert=4).data_ranks == 8


@pytest.mark.parametrize(
    ("world_size", "sizes", "message"),
    [
        (4, {"data_replicate": 3}, "must divide the number of processes, which is 4"),
        (4, {"data_replicate": 2, "data_shard": 4}, r"data_replicate is 2, times data_shard = 4 it must be .* is 4"),
        (4, {"tensor": 3}, r"data_replicate \* tensor is 1 \* 3, must divide the number of processes, which is 4"),
        (4, {"tensor": 2, "context": 2}, "one of them must be 1"),
        (1, {"data_shard": 2}, "start torchrun with --nproc-per-node 2"),
        (4, {"expert": 3}, r"parallel.expert is 3, must divide data_shard \* tensor \* context = 4"),
        (4, {"data_replicate": 4, "expert": 2}, "parallel.expert is 2, must divide .* = 1"),
        (2, {"data_shard": "all"}, "must be auto or a number"),
        (2, {"data_shard": 0}, "parallel.data_shard is 0, must be at least 1"),
        (4, {"pipeline": 3}, r"data_replicate \* pipeline is 1 \* 3, must divide the number of processes, which is 4"),
        (2, {"expert": 0}, "parallel.expert is 0, must be at least 1"),
        (2, {"expert_rows": 0}, "parallel.expert_rows is 0.0, must be above 0; try 2"),
        (2, {"reduce": "fp8"}, "must be one of fp32, bf16"),
        (2, {"timeout": 0}, "above 0"),
        (2, {"sharded": "all"}, "must be one of parameters, optimizer"),
        (2, {"sharded": "optimizer", "tensor": 2}, "no rank holds the model whole; set it to parameters"),
        (2, {"sharded": "optimizer", "pipeline": 2}, "no rank holds the model whole; set it to parameters"),
        (2, {"experts": 2}, "did you mean 'expert'"),
    ],
)
def test_what_does_not_fit_is_named_with_its_key(world_size: int, sizes: dict[str, int | str], message: str):
    with pytest.raises(ConfigError, match=message):
        resolved(world_size, **sizes)


@pytest.mark.parametrize(
    ("num_experts", "kind", "message"),
    [(0, "grouped", "no layer of this model has experts"), (6, "grouped", "must divide"), (8, "merged", "lory")],
)
def test_experts_that_cannot_be_shared_are_refused(num_experts: int, kind: str, message: str):
    with pytest.raises(ConfigError, match=message):
        check_experts(resolved(4, expert=4), num_experts, kind)


@pytest.mark.parametrize(
    ("model", "length", "message"),
    [
        ({}, 30, "parallel.context is 4, must divide data.sequence_length = 30"),
        ({"num_kv_heads": 2}, 32, "must divide model.num_heads = 4 and model.num_kv_heads = 2"),
        ({"block": "post_norm", "num_kv_heads": None}, 32, "must be 1 with model.block post_norm"),
        ({"router": "lory"}, 32, "router 'lory', which looks at whole sequences"),
        ({"router": {"name": "rmoe", "passing": "shuffle"}}, 32, "router 'rmoe', which looks at whole sequences"),
    ],
)
def test_sequences_that_cannot_be_shared_are_refused(model: dict[str, Any], length: int, message: str):
    config = from_dict(ReMoEConfig, {"num_heads": 4, "num_kv_heads": 4} | model)
    with pytest.raises(ConfigError, match=message):
        check_sequence(resolved(4, context=4), config, length)


def test_a_batch_is_shared_evenly():
    assert own_micro_batch(4, 16, None) == 4
    assert own_micro_batch(4, 16, 2) == 2
    with pytest.raises(ConfigError, match="multiple of the 4 data ranks"):
        own_micro_batch(4, 10, None)
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size is 3, must divide"):
        own_micro_batch(4, 16, 3)
