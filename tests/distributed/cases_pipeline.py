"""Models that are harder to cut into stages, and what a pipeline does besides steps."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from cases_numbers import ROWS, alone, batch, compare, config, put, take_step, together
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from remoe.distributed.world import world_size
from remoe.training.flips import FlipMeter
from remoe.training.step import Stepper
from remoe.training.validation import evaluate

STEPS = 3
MODELS: dict[str, dict[str, Any]] = {
    "tied embedding": {"tie_embeddings": True},
    "dense first stage": {"router": "recurrent_relu", "moe_layers": [2, 3]},
    "dense last stage": {"router": "recurrent_relu", "moe_layers": [0]},
    "no experts": {"moe_layers": "none"},
    "relative positions": {"block": "post_norm", "num_kv_heads": None, "attention_span": 8, "router": "rmoe"},
    "token ids": {"router": "hash"},
    "token ids, another table a layer": {"router": {"name": "hash", "table": "random", "per_layer": True}},
    "states that stay": {"router": {"name": "rmoe", "passing": "none"}},
    "states that swap": {"router": {"name": "rmoe", "passing": "shuffle"}},
    "own running state": {"router": "loss_free"},
}
SPARSITY: dict[str, dict[str, Any]] = {
    "a coefficient a layer": {"per_layer": True, "density_floor": 0.5, "revival_coef": 0.01},
    "loads of the step before": {"loads": "previous_step"},
}


def pair(model: dict[str, Any], sparsity: dict[str, Any] | None = None) -> tuple[Stepper, Stepper]:
    """One process and a pipeline of all, with four layers, gradients that are clipped, and an L1 term that acts."""
    changes: dict[str, Any] = {
        "model": {"num_layers": 4} | model,
        "optimizer": {"lr": 5e-3, "clip": 0.1},
        "losses": {"router_z_coef": 0.01},
        "sparsity": {"init": 0.1, "multiplier": 1.7} | (sparsity or {}),
    }
    loop = {"micro_batch_size": ROWS // max(2, world_size())}
    one = config("relu", train=dict(loop), **changes)
    many = config("relu", train=dict(loop), parallel={"pipeline": world_size()}, **changes)
    return alone(one), together(many)


def awkward() -> dict[str, Any]:
    """The third step of each model, from the weights that its first two have led to."""
    found = {}
    for name, model in MODELS.items():
        found[name] = last_step(*pair(model))
    for name, sparsity in SPARSITY.items():
        found[name] = last_step(*pair({}, sparsity))
    return found


def last_step(expected: Stepper, ours: Stepper) -> dict[str, Any]:
    for step in range(1, STEPS):
        compare(ours, expected, step)
    return compare(ours, expected, STEPS)


def closed() -> dict[str, Any]:
    """A step in which no token of the last stage has an expert."""
    expected, ours = pair({})
    state = {name: value.detach().clone() for name, value in expected.tensors().items()}
    state["model.model.layers.3.mlp.router.weight"].zero_()
    if world_size() == 2:
        state["model.model.layers.2.mlp.router.weight"].zero_()
    put(expected, state)
    put(ours, state)
    return compare(ours, expected, 1)


def held_out() -> list[dict[str, Any]]:
    """What validation and the flip meter find alone, and in a pipeline."""
    return [looked_at(stepper) for stepper in pair({"router": "recurrent_relu", "moe_layers": [1, 2, 3]})]


def looked_at(stepper: Stepper) -> dict[str, Any]:
    """Validation, and how much a step flips."""
    meter = FlipMeter(stepper.model, batch(0), document_mask=False, ranks=stepper.ranks)
    meter.before_step()
    take_step(stepper, 1)
    flips = stepper.ranks.average(meter.after_step())
    result = evaluate(stepper.model, [batch(5), batch(6), batch(7)], ["all"], ranks=stepper.ranks)
    return result | {name: value.item() for name, value in flips.items()}


def gathers() -> dict[str, Any]:
    """How often the units of this stage are gathered and reduced in a step of 8 micro-batches."""
    found = {}
    for reshard in (True, False):
        many = config("relu", train={"micro_batch_size": 1}, parallel={"pipeline": world_size(), "reshard": reshard})
        stepper = together(many)
        take_step(stepper, 1)
        with counted() as counts:
            take_step(stepper, 2)
        units = [unit for unit in stepper.model.modules() if isinstance(unit, FSDPModule)]
        found[str(reshard)] = counts | {"units": len(units) - 1, "received": received_bytes(stepper)}
    return found


def received_bytes(stepper: Stepper) -> int:
    """Of torch's buffers for what other stages send this one."""
    stage = stepper.pipelined._schedule._schedule._stage  # pyright: ignore
    infos = [*stage.args_recv_info.values(), *stage.grad_recv_info.values()]
    buffers = [info.buffer for of_micro_batch in infos for info in of_micro_batch if info.buffer is not None]
    return sum(buffer.untyped_storage().nbytes() for buffer in buffers)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts what FSDP does with its units; between ranks of its own or alone, it does the same."""
    counts: Counter[str] = Counter()
    unshard, reduce = FSDPParamGroup.unshard, FSDPParamGroup.post_backward

    def counting_unshard(self: FSDPParamGroup, *options: Any) -> None:
        counts["gathered"] += self._all_gather_result is None and not self.is_unsharded
        unshard(self, *options)

    def counting_reduce(self: FSDPParamGroup, *inputs: Any) -> None:
        counts["reduced"] += self.reduce_grads and any(
            parameter.unsharded_accumulated_grad is not None or parameter.unsharded_param.grad is not None
            for parameter in self.fsdp_params
            if hasattr(parameter, "_unsharded_param")
        )
        reduce(self, *inputs)

    with patch.multiple(FSDPParamGroup, unshard=counting_unshard, post_backward=counting_reduce):
        yield counts


CASES: dict[str, Callable[[], Any]] = {
    "awkward": awkward,
    "closed": closed,
    "held_out": held_out,
    "gathers": gathers,
}
