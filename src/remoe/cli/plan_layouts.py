"""The part of `remoe plan --gpus N` about layouts: the fastest that fit, and what their numbers rest on."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from remoe.cli.table import table

if TYPE_CHECKING:
    from remoe.distributed.planning import Constant
    from remoe.training.config import TrainConfig

GIB = 2**30
SHOWN = 12
LAYOUT = ("data_replicate", "data_shard", "expert", "tensor", "context", "pipeline", "sharded")


def layouts_values(run: "TrainConfig", num_gpus: int) -> dict[str, Any]:
    """`layouts`, each as plain values, and the `machine` with the source of every constant.

    ConfigError where neither model nor batch can be shared by so many GPUs.
    """
    from remoe.distributed.planning import estimates, machine
    from remoe.errors import ConfigError
    from remoe.training.job import job_of

    gpus = machine()
    found = estimates(job_of(run), num_gpus, gpus)
    if not found:
        raise ConfigError(
            f"--gpus is {num_gpus}, but train.batch_size = {run.train.batch_size} sequences of data.sequence_length = "
            f"{run.data.sequence_length} cannot be shared evenly by so many, nor its {run.model.num_layers} "
            "layers by stages; choose a divisor, or a larger batch_size"
        )
    return {
        "gpus": num_gpus,
        "compiled": run.train.compile,
        "layouts": [dataclasses.asdict(one) for one in found],
        "machine": dataclasses.asdict(gpus),
    }


def layouts_text(values: Mapping[str, Any]) -> str:
    """A table of the first layouts, and the constants that were measured and assumed."""
    from remoe.distributed.planning.machine import machine_of

    layouts, gpus = values["layouts"], machine_of(values["machine"])
    fitting = sum(one["fits"] for one in layouts)
    how = "compiled" if values["compiled"] else "not compiled (train.compile is false)"
    head = f"{values['gpus']} x {gpus.name}, {how}: {fitting} of {len(layouts)} layouts fit; the fastest"
    lines = [f"{head} {min(SHOWN, len(layouts))}:"]
    lines += [_table([_row(one) for one in layouts[:SHOWN]])]
    lines += ["memory, at start, gathers, all-to-all and to stages: of one GPU, the last three of a micro-batch (mean)"]
    lines += ["bubble: what of the step the stages of a pipeline wait for the others (1F1B)"]
    lines += ["columns in which nothing is shared or sent are left out; --json has all of them, and all layouts"]
    measured = {key: constant for key, constant in gpus.constants.items() if not constant.is_assumed}
    lines += [f"measured: {_listed(measured)}", f"assumed: {_listed(gpus.assumptions)}"]
    return "\n".join(lines)


_COSTS = ("micro-batch", "memory", "at start", "gathers", "all-to-all", "to stages", "bubble", "step", "tokens/s")
_HEAD = (*LAYOUT, *_COSTS)
_NOTHING = ("1", "0.00 GiB", "0%")


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Without the columns that say nothing."""
    kept = [index for index in range(len(_HEAD)) if any(row[index] not in _NOTHING for row in rows)]
    return table([_HEAD[index] for index in kept], [tuple(row[index] for index in kept) for row in rows])


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    memory, traffic, seconds = one["memory"], one["traffic"], one["step_seconds"]
    sizes = [memory["total"], memory["total_at_start"], *(traffic[key] for key in ("gathers", "all_to_all", "stages"))]
    rate = f"{one['tokens_per_second']:,.0f}" if one["fits"] else "does not fit"
    return (
        *(str(one["parallel"][key]) for key in LAYOUT),
        str(one["micro_batch_size"]),
        *(f"{size / GIB:.2f} GiB" for size in sizes),
        f"{seconds['bubble'] / seconds['total']:.0%}",
        f"{seconds['total']:.3f} s",
        rate,
    )


def _listed(constants: Mapping[str, "Constant"]) -> str:
    return ", ".join(f"{key} {constant.value:.4g} {constant.unit}" for key, constant in constants.items())
