"""Steps of ranks that share experts and know beforehand how many rows they exchange, beside those of one process."""

from itertools import product
from typing import Any

import torch
from cases_numbers import (
    DEVICE,
    LENGTH,
    ROWS,
    STAGES,
    alone,
    compare,
    config,
    layouts,
    no_code_generated,
    num_graphs,
    own_rows,
    put,
    states,
    take_step,
    together,
    whole,
)
from torch import Tensor

from remoe.config import from_dict
from remoe.data import Batch
from remoe.distributed.config import ParallelConfig, resolve_parallel
from remoe.distributed.world import world_size
from remoe.training.ahead import RunAhead, row_policy
from remoe.training.pace import Pace
from remoe.training.step import Stepper


def known_rows() -> dict[str, Any]:
    """One step from each stage with just as much room at each rank's experts as it needs; and with one row less, which
    must leave no trace.
    """
    found = {}
    for router, name in product(("relu", "recurrent_relu"), layouts()):
        if "experts" not in name or "parts" in name:  # in parts, ranks tell each other
            continue
        one = config(router, train={"micro_batch_size": ROWS // 2})
        own = ROWS // 2 // resolve_parallel(from_dict(ParallelConfig, layouts()[name]), world_size()).data_ranks
        parallel = layouts()[name] | {"expert_rows": 4.0}  # room for all tokens of all ranks
        expected, ours = alone(one), together(config(router, train={"micro_batch_size": own}, parallel=parallel))
        for stage, state in states(router).items():
            found[f"{router}, {name}, {stage}"] = with_known_rows(ours, expected, state, STAGES[stage] + 1)
    return found


def with_known_rows(ours: Stepper, expected: Stepper, state: dict[str, Tensor], step: int) -> dict[str, Any]:
    put(ours, state)
    needs = [int(need) for need in take_step(ours, step)["needs"]]
    ours.row_capacities = [*needs[:-2], needs[-2] - 1, needs[-1]]
    put(ours, state)
    before = {name: whole(value.detach()).clone() for name, value in ours.tensors().items()}
    take_step(ours, step)
    after = {name: whole(value.detach()) for name, value in ours.tensors().items()}
    is_void = ours.overflowed.item(), all(torch.equal(after[name], before[name]) for name in after)
    ours.overflowed.zero_()
    ours.row_capacities = needs
    put(expected, state)
    compared = compare(ours, expected, step)
    overflowed, ours.row_capacities = ours.overflowed.item(), None
    return compared | {"overflowed": overflowed, "void_with_less": is_void}


@no_code_generated()
def compiled_known_rows() -> dict[str, Any]:
    """A step of shared experts whose rows are known, and how many graphs it adds to those of steps without."""
    loop = {"compile": True, "micro_batch_size": ROWS // 4}
    expected = alone(config("relu", train={"micro_batch_size": ROWS // 2}))
    parallel = layouts()["optimizer and experts"] | {"expert_rows": 1.5}
    ours = together(config("relu", train=loop, parallel=parallel))
    pace = Pace(ours.model, DEVICE, ours.has_graph)  # pyright: ignore[reportArgumentType]
    ours.around_backward = pace.span
    put(ours, states("relu")["sparse"])
    needs = take_step(ours, 61)["needs"].tolist()
    found = {}
    for name, row_capacities in {"known": needs, "above the budget": [ROWS * LENGTH] * len(needs)}.items():
        before, ours.row_capacities = num_graphs(), row_capacities
        put(ours, states("relu")["sparse"])
        put(expected, states("relu")["sparse"])
        with pace.measured():
            found[name] = {"step": compare(ours, expected, 61), "graphs": num_graphs() - before}
        found[name]["own seconds"] = pace.seconds
    return found


def ahead() -> dict[str, Any]:
    """Losses of a run whose ranks share experts, exact and with row capacities; how many steps had those, how many were
    void.
    """
    found = {}
    for rows in ("exact", "capacity"):
        ours = together(config("topk", train={"rows": rows}, parallel={"expert": 2}))
        found[rows] = list[float]()
        steps = Taken(ours)
        policy = row_policy(ours)
        run_ahead = RunAhead(ours, steps, policy)
        for step in range(1, 41):
            if step == 30 and policy is not None and policy.capacities is not None:
                policy.capacities = (1,) * len(policy.capacities)
            finished = run_ahead.launch(own_rows(ours, step), step)
            found[rows] += [launched.readout.read()["lm_loss"] for launched in finished]
        found[rows] += [launched.readout.read()["lm_loss"] for launched in run_ahead.settle()]
        found |= {"with_capacity": steps.with_capacity, "again": steps.count - 40}
    return found


class Taken:
    """Takes steps and counts them, and those with row capacities."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper, self.count, self.with_capacity = stepper, 0, 0

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        self.count += 1
        self.with_capacity += self.stepper.row_capacities is not None
        return self.stepper.run(batch, step)


CASES = {"known_rows": known_rows, "compiled_known_rows": compiled_known_rows, "ahead": ahead}
