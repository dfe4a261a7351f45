"""`remoe plan`: what a model costs, without building it."""

from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from remoe.cli.options import AsJson, Config, Overrides
from remoe.cli.table import table

if TYPE_CHECKING:
    from remoe.model import ReMoEConfig
    from remoe.training.config import TrainConfig

GIB = 2**30
GPUs = Annotated[int | None, Option("--gpus", metavar="N", min=1, help="also the cost of each layout on N GPUs")]


def plan_command(config: Config, overrides: Overrides = None, gpus: GPUs = None, as_json: AsJson = False) -> None:
    """Parameters, FLOPs and memory of a model.

    For training on one device, without building it; with --gpus also memory, traffic and step time of each layout.
    """
    import dataclasses
    import json

    from remoe.cli.plan_layouts import layouts_text, layouts_values
    from remoe.model.recompute import recomputation
    from remoe.model.size import Workload, plan
    from remoe.recipes import read_config
    from remoe.training.init_from import with_origin

    run = with_origin(read_config(config, overrides or ()), None)
    run = dataclasses.replace(run, model=_model(run))
    workload = Workload(
        sequence_length=run.data.sequence_length,
        micro_batch_size=run.train.micro_batch,
        precision=run.train.precision,
        activation_checkpointing=recomputation("train.activation_checkpointing", run.train.activation_checkpointing),
    )
    values = dataclasses.asdict(plan(run.model, workload))
    values["tokens"] = run.train.steps * run.train.batch_size * run.data.sequence_length
    values["training_flops"] = values["tokens"] * values["flops_per_token"]
    values["workload"] = dataclasses.asdict(workload)
    if gpus is not None:
        values |= layouts_values(run, gpus)
    if as_json:
        print(json.dumps(values, indent=1))
        return
    print(_text(values) if gpus is None else f"{_text(values)}\n\n{layouts_text(values)}")


def _model(run: "TrainConfig") -> "ReMoEConfig":
    """The model with its vocabulary: the config's, else the tokenizer's."""
    import dataclasses

    from remoe.data import load_tokenizer

    if run.model.vocab_size is not None:
        return run.model
    return dataclasses.replace(run.model, vocab_size=load_tokenizer(run.data.tokenizer).vocab_size)


def _text(values: dict[str, Any]) -> str:
    memory = [(f"memory: {part.replace('_', ' ')}", f"{size / GIB:.2f} GiB") for part, size in values["memory"].items()]
    rows = [
        ("parameters", f"{values['parameters']['total']:,}"),
        ("active per token", f"{values['parameters']['active']:,}"),
        ("FLOPs per token", f"{values['flops_per_token']:,}"),
        ("tokens", f"{values['tokens']:,}"),
        ("FLOPs of the run", f"{values['training_flops']:.3e}"),
    ]
    return f"{table(('what', 'amount'), [*rows, *memory])}\n{_assumptions(values['workload'])}"


def _assumptions(workload: dict[str, Any]) -> str:
    checkpointing = {"none": "without", "full": "with", "selective": "with selective"}[
        workload["activation_checkpointing"]
    ]
    return (
        f"memory: for micro-batches of {workload['micro_batch_size']} x {workload['sequence_length']} tokens in "
        f"{workload['precision']}, {checkpointing} activation checkpointing\n"
        "at start: in the first steps, when ReLU routing has half of all gates open; other routers start as they go on"
    )
