"""One step of several processes beside the same step of one, from states along a run; and whole runs of both."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from remoe.config import from_dict
from remoe.data import Batch
from remoe.distributed import launch
from remoe.distributed.config import ParallelConfig, resolve_parallel
from remoe.distributed.data_ranks import DataRanks
from remoe.distributed.world import world_size
from remoe.model import ReMoEForCausalLM
from remoe.moe import SparsityController
from remoe.training import TrainConfig
from remoe.training.step import Stepper

ROWS, LENGTH, VOCABULARY = 8, 16, 32
DEVICE = launch.local_device(torch.device(os.environ.get("DEVICE", "cpu")))
ROUTERS = ("relu", "topk", "recurrent_relu")
TOLERANCE = 1e-5
STAGES = {"dense": 2, "sparser": 26, "sparse": 60}
"""Steps after which a state is taken: before the L1 term acts, while it thins the experts out, at the target."""
TWO = {
    "shards": {}, "copies": {"data_replicate": 2}, "kept": {"reshard": False}, "experts": {"expert": 2},
    "context": {"context": 2}, "tensor": {"tensor": 2}, "context with experts": {"context": 2, "expert": 2},
    "pipeline": {"pipeline": 2}, "experts in parts": {"expert": 2, "expert_rows": 0.5},
    "optimizer": {"sharded": "optimizer"}, "optimizer and experts": {"sharded": "optimizer", "expert": 2},
    "optimizer and context": {"sharded": "optimizer", "context": 2},
}  # fmt: skip
FOUR = {
    "shards": {},
    "copies": {"data_replicate": 2},
    "experts": {"expert": 4},
    "experts and shards": {"expert": 2},
    "experts in parts": {"expert": 4, "expert_rows": 0.5},
    "copies with experts": {"data_replicate": 2, "expert": 2},
    "context": {"context": 2},
    "tensor": {"tensor": 2},
    "tensor with experts": {"tensor": 2, "expert": 4},
    "copies with context": {"data_replicate": 2, "context": 2},
    "optimizer": {"sharded": "optimizer"},
    "optimizer and copies": {"sharded": "optimizer", "data_replicate": 2},
    "optimizer and experts": {"sharded": "optimizer", "expert": 2},
    "optimizer, copies, experts": {"sharded": "optimizer", "data_replicate": 2, "expert": 2},
    "pipeline and shards": {"pipeline": 2},
    "pipeline and copies": {"pipeline": 2, "data_replicate": 2},
    "pipeline with experts": {"pipeline": 2, "expert": 2},
    "pipeline with context": {"pipeline": 2, "context": 2},
    "pipeline with tensor": {"pipeline": 2, "tensor": 2},
}


def layouts() -> dict[str, dict[str, Any]]:
    """Those that this number of processes can have."""
    return TWO if world_size() == 2 else FOUR


def config(router: str, **changes: Any) -> TrainConfig:
    """A run whose coefficient doubles each step, so that all three stages pass in 60."""
    model = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
        "intermediate_size": 16, "num_experts": 4, "init_std": 0.15, "router": router,
    } | changes.pop("model", {})  # fmt: skip
    sections = {
        "optimizer": {"lr": 5e-3, "warmup_steps": 2, "clip": 0.0},
        "sparsity": {"multiplier": 1.7, "init": 1e-6},
        "train": {"steps": 80, "batch_size": ROWS, "device": str(DEVICE)} | changes.pop("train", {}),
    }
    return from_dict(TrainConfig, {"model": model, **sections, **changes})


def batch(step: int) -> Batch:
    """Sequences that count up from a random token by 1 or 3: there is something to learn."""
    draw = torch.Generator().manual_seed(step)
    start_B1 = torch.randint(0, VOCABULARY, (ROWS, 1), generator=draw)
    stride_B1 = 1 + 2 * torch.randint(0, 2, (ROWS, 1), generator=draw)
    tokens_BS = (start_B1 + stride_B1 * torch.arange(LENGTH + 1)) % VOCABULARY
    labels_BS = tokens_BS[:, 1:].clone()
    labels_BS[0, : 3 + step % 5] = -100  # rows with different numbers of labels
    zeros_BS = torch.zeros_like(labels_BS)
    return Batch(tokens_BS[:, :-1], labels_BS, zeros_BS, zeros_BS)


def alone(built: TrainConfig) -> Stepper:
    """The stepper of one process."""
    return Stepper(built, ReMoEForCausalLM(built.model, seed=1), DEVICE)


def together(built: TrainConfig) -> Stepper:
    """This rank's part of the stepper of all processes."""
    ranks = launch.join(resolve_parallel(built.parallel, world_size()), DEVICE)
    return Stepper(built, ReMoEForCausalLM(built.model, seed=1), DEVICE, ranks)


def take_step(stepper: Stepper, step: int) -> dict[str, Tensor]:
    """Step number `step` on this rank's rows."""
    return stepper.run(own_rows(stepper, step), step)


def own_rows(stepper: Stepper, step: int) -> Batch:
    """This rank's rows of a step's batch."""
    parts = stepper.ranks.rows(ROWS, stepper.micro_batch)
    rows = [row for part in parts for row in range(ROWS)[part]]
    return Batch(*(values[rows] for values in batch(step)))


@cache
def states(router: str) -> dict[str, dict[str, Tensor]]:
    """Everything a resumed run needs, after the steps of STAGES."""
    stepper, found = alone(config(router)), {}
    for step in range(1, max(STAGES.values()) + 1):
        take_step(stepper, step)
        for name, after in STAGES.items():
            if step == after:
                found[name] = {key: value.detach().clone() for key, value in stepper.tensors().items()}
    return found


def put(stepper: Stepper, state: dict[str, Tensor]) -> None:
    """Make a stepper go on from a state, whatever its layout."""
    with torch.no_grad():
        for name, target in stepper.tensors().items():
            if isinstance(target, DTensor):
                part = distribute_tensor(state[name], target.device_mesh, target.placements)
                target.to_local().copy_(part.to_local())
            else:
                target.copy_(state[name])
    stepper.update_model()


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    return ((whole(found) - whole(expected)).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def compare(found: Stepper, expected: Stepper, step: int) -> dict[str, Any]:
    """How far apart loss, gradients and the weights after the step are; the names of gradients that only one has."""
    values, reference = take_step(found, step), take_step(expected, step)
    pairs = [(name, ours, expected.weights[name]) for name, ours in found.weights.items()]
    lacking = [name for name, ours, theirs in pairs if (ours.grad is None) != (theirs.grad is None)]
    gradients = [
        (distance(ours.grad, theirs.grad), name)
        for name, ours, theirs in pairs
        if ours.grad is not None and theirs.grad is not None
    ]
    counts = [name for name in ("active", "total", "tokens", "max_tokens") if name in reference]
    return {
        "loss": distance(values["loss"], reference["loss"]),
        "lm_loss": distance(values["lm_loss"], reference["lm_loss"]),
        "grad_norm": distance(values["grad_norm"], reference["grad_norm"]),
        "gradient": max(gradients),
        "weights": max(distance(ours.detach(), theirs.detach()) for _, ours, theirs in pairs),
        "lacking": lacking,
        "counts": all(values[name].tolist() == reference[name].tolist() for name in counts),
        "coef": None if found.controller is None else found.controller.log_coef.tolist(),
        "expected_coef": None if expected.controller is None else expected.controller.log_coef.tolist(),
        "sparsity": 1 - (reference["active"].sum() / reference["total"].sum()).item() if counts else None,
    }


Case = tuple[str, str, bool]
"""Router, layout and whether activations are recomputed."""


def all_cases() -> list[Case]:
    """Every combination."""
    return list(product(ROUTERS, layouts(), (False, True)))


def some_cases() -> list[Case]:
    """Every layout, and every router with what is most likely to go wrong."""
    found = [("relu", name, False) for name in layouts()]
    found += [
        ("recurrent_relu", name, True)
        for name in layouts()
        if name in ("shards", "experts", "experts in parts", "context", "tensor", "pipeline", "optimizer and experts")
    ]
    return [*found, *(("topk", name, False) for name in ("shards", "experts", "pipeline", "optimizer"))]


def some_steps() -> dict[str, Any]:
    """One step from each stage for some cases."""
    return steps(some_cases())


def all_steps() -> dict[str, Any]:
    """The same for all but pipelines."""
    return steps(case for case in all_cases() if "pipeline" not in case[1])


def pipelined_steps() -> dict[str, Any]:
    """The same for all pipelines."""
    return steps(case for case in all_cases() if "pipeline" in case[1])


def steps(cases: Iterable[Case], **loop_changes: Any) -> dict[str, Any]:
    """One step from each stage for each case, in two micro-batches. `loop_changes` are those of the processes' loop."""
    found = {}
    for router, name, is_recomputed in cases:
        parallel = layouts()[name]
        loop = {"activation_checkpointing": is_recomputed}
        one = config(router, train=loop | {"micro_batch_size": ROWS // 2})
        own = ROWS // 2 // resolve_parallel(from_dict(ParallelConfig, parallel), world_size()).data_ranks
        many = config(router, train=loop | {"micro_batch_size": own} | loop_changes, parallel=parallel)
        expected, ours = alone(one), together(many)
        for stage, state in states(router).items():
            put(expected, state)
            put(ours, state)
            key = f"{router}, {name}{', recomputed' if is_recomputed else ''}, {stage}"
            found[key] = compare(ours, expected, STAGES[stage] + 1)
    return found


COMPILED = (
    ("relu", "shards"),
    ("recurrent_relu", "shards"),
    ("relu", "experts"),
    ("relu", "tensor"),
    ("relu", "pipeline"),
    ("relu", "optimizer"),
    ("recurrent_relu", "optimizer and experts"),
)


def compiled_steps() -> dict[str, Any]:
    """The same with compiled parts, in some layouts, and how many graphs those are."""
    found = {}
    with no_code_generated():
        for router, name in COMPILED:
            torch.compiler.reset()
            torch._dynamo.utils.counters.clear()
            found[f"{router}, {name}"] = {"steps": steps([(router, name, True)], compile=True), "graphs": num_graphs()}
    return found


@contextmanager
def no_code_generated() -> Iterator[None]:
    """Inside, torch.compile makes graphs and runs them as they are."""
    original, torch.compile = torch.compile, partial(torch.compile, backend="aot_eager")
    try:
        yield
    finally:
        torch.compile = original


def num_graphs() -> int:
    """Compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def rounded() -> dict[str, Any]:
    """One step in bf16 with whole weights at each rank, beside one process with the same micro-batches."""
    settings = {"sparsity": {"loads": "micro_batch"}}
    loop = {"precision": "bf16", "micro_batch_size": ROWS // 4}
    expected = alone(config("relu", train=loop, **settings))
    ours = together(config("relu", train=loop, parallel=layouts()["optimizer"], **settings))
    found = {}
    for stage, state in states("relu").items():
        put(expected, state)
        put(ours, state)
        found[stage] = compare(ours, expected, STAGES[stage] + 1)
    return found


def variants() -> dict[str, Any]:
    """One step of ranks that share the optimizer: with a tied embedding, and with gradients reduced in bf16."""
    found = {}
    copies = {"data_replicate": world_size(), "data_shard": 1}
    for name, model, parallel in (
        ("tied", {"tie_embeddings": True}, {}), ("bf16", {}, {"reduce": "bf16"}),
        ("bf16, copies", {}, {"reduce": "bf16"} | copies), ("copies", {}, copies),
    ):  # fmt: skip
        expected = alone(config("relu", model=model))
        ours = together(config("relu", model=model, parallel={"sharded": "optimizer"} | parallel))
        found[name] = compare(ours, expected, 1)
    return found


def averaged() -> float:
    """The largest error of a gradient if the ranks' gradients were averaged, as data-parallel training mostly does."""
    ours, expected = together(config("relu", parallel={"expert": 2})), alone(config("relu"))
    for module in ours.model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(float(world_size()))
    return compare(ours, expected, 1)["gradient"][0]


def runs() -> dict[str, Any]:
    """Losses of whole runs: of one process, of one whose embedding is off by a bit, and of all together."""
    found = {}
    for router in ROUTERS:
        one, noisy, many = alone(config(router)), alone(config(router)), together(config(router))
        with torch.no_grad():
            embedding = noisy.model.model.embed_tokens.weight  # pyright: ignore
            embedding.copy_(torch.nextafter(embedding, torch.full_like(embedding, 9.0)))
        losses = [
            [take_step(stepper, step)["lm_loss"].item() for step in range(1, 81)] for stepper in (one, noisy, many)
        ]
        coefs = [stepper.controller.log_coef.item() if stepper.controller else 0.0 for stepper in (one, noisy, many)]
        found[router] = {"losses": losses, "coefs": coefs}
    return found


def coefficients() -> dict[str, Any]:
    """The coefficient after 1,000 steps with random counts, of all ranks together and of their sums in one place."""
    ours = DataRanks(resolve_parallel(config("relu").parallel, world_size()), DEVICE)
    together, expected = SparsityController(1, 4).to(DEVICE), SparsityController(1, 4)
    draw = torch.Generator().manual_seed(0)
    for _ in range(1000):
        active_R = torch.randint(0, 2**40, (ours.size,), generator=draw)
        total_R = 4 * active_R + torch.randint(-2, 3, (ours.size,), generator=draw)  # a hair from the target
        own = {"active": active_R[ours.index].to(DEVICE), "total": total_R[ours.index].to(DEVICE)}
        counts = ours.total(own)
        together.update(**counts)
        expected.update(active_R.sum(), total_R.sum())
    return {"found": together.log_coef.item(), "expected": expected.log_coef.item()}


def poisoned() -> dict[str, Any]:
    """A step in which the last rank's loss is NaN, and what it left of weights, optimizer and coefficient."""
    ours = together(config("relu"))
    take_step(ours, 1)
    before = {name: whole(value.detach()).clone() for name, value in ours.tensors().items()}
    factor = float("nan") if ours.ranks.index == ours.ranks.size - 1 else 1.0
    poison = ours.model.model.norm.register_forward_hook(lambda module, inputs, hidden: hidden * factor)
    values = take_step(ours, 2)
    after = {name: whole(value.detach()) for name, value in ours.tensors().items()}
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    poison.remove()
    return {
        "skipped": values["skipped"].item(),
        "changed": changed,
        "next": take_step(ours, 3)["skipped_in_a_row"].item(),
    }


def void() -> dict[str, Any]:
    """A step for which the first rank allocated too few rows while the others are exact."""
    ours = together(config("relu"))
    before = {name: whole(value.detach()).clone() for name, value in ours.tensors().items()}
    ours.row_capacities = [1] * len(ours.layers) if ours.ranks.is_first else None
    take_step(ours, 1)
    after = {name: whole(value.detach()) for name, value in ours.tensors().items()}
    return {
        "overflowed": ours.overflowed.item(),
        "changed": [name for name in after if not torch.equal(after[name], before[name])],
    }


CASES: dict[str, Callable[[], Any]] = {
    "some_steps": some_steps,
    "all_steps": all_steps,
    "pipelined_steps": pipelined_steps,
    "compiled_steps": compiled_steps,
    "rounded": rounded,
    "variants": variants,
    "averaged": averaged,
    "runs": runs,
    "coefficients": coefficients,
    "poisoned": poisoned,
    "void": void,
}
